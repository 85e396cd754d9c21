"""Hostile requests: whatever a client sends is read with the right counts, or is one RequestError that names it."""

import functools
import json
import math
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from gpsd_dist.serving.requests import Limits, RequestError, RequestReader
from gpsd_dist.serving.tokens import Tokens
from tests.fuzz.properties import clean_or_one_error, fuzz
from tests.unit.serving import shop

LIMITS = Limits(max_candidates=6, max_events=9, max_bag_values=4, max_id_bytes=30)
ROWS = {name: {word: 2 + row for row, word in enumerate(words)} for name, words in shop.VOCABULARIES.items()}
ROWS |= {"brand": {"X": 5, "Y": 3}}
ITEMS = {"a": ("anne", "X", 0), "b": ("bob", "Z", 1), "7": (None, "Y", 0)}
"""Item -> author, brand, number of unknown tags."""

numbers = st.none() | st.integers(-(10**6), 10**6) | st.floats(-1e30, 1e30)
times = st.none() | st.integers(0, 40) | st.floats(0, 40)
texts = st.none() | st.sampled_from(["a", "b", "7", 7, 7.0, " b ", "", "new", "red", "blue", "view", "X", True])
hostile = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from([10**400, -(10**400), 2**63, float("nan"), "\ud800", "\0", b"bytes", {"a": 1}, object()]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@st.composite
def requests(draw) -> dict:
    """Draws what a client may send."""
    num_events, num_candidates = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    made = {"request_time_s": draw(st.integers(0, 40)), "context.tab": draw(texts), "context.age": draw(numbers)}
    for place, count in (("history", num_events), ("candidate", num_candidates)):
        own = {"history": {"time_s": times, "action": texts}, "candidate": {"position": numbers}}[place]
        optional = {"author": texts, "brand": texts, "price": numbers, "tags": st.none() | st.lists(texts, max_size=4)}
        optional |= {"latest_s": times} if place == "history" else {}
        chosen = {name: values for name, values in optional.items() if draw(st.booleans())}
        for name, values in ({"item": texts} | own | chosen).items():
            made[f"{place}.{name}"] = draw(st.lists(values, min_size=count, max_size=count))
    return made


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz_requests_")


@functools.cache
def _reader(split_rule: str) -> RequestReader:
    return shop.reader(pathlib.Path(_folder().name), LIMITS, split_rule=split_rule)


@fuzz(150, sent=st.lists(requests(), max_size=4), split_rule=st.sampled_from(["TimeBoundaries", "LeaveLastOut"]))
def test_counts_are_those_of_a_plain_reading(sent, split_rule):
    reader = _reader(split_rule)
    tokens = reader(reader.from_json(sent))
    _is_whole(tokens, len(sent))
    events = [_visible(request, split_rule == "TimeBoundaries") for request in sent]
    kept = [found[-4:] for found in events]
    assert tokens.history_length_B.tolist() == [len(found) for found in kept]
    assert tokens.dropped_events_B.tolist() == [
        len(request["history.item"]) - len(found) for request, found in zip(sent, events, strict=True)
    ]
    assert tokens.counts["events over the limit"] == sum(max(len(found) - 4, 0) for found in events)
    expected = [_unknown(request, found) for request, found in zip(sent, kept, strict=True)]
    assert tokens.unknown_ids_B.tolist() == expected
    assert sum(count for name, count in tokens.counts.items() if name.startswith("unknown ")) == sum(expected)
    parts = [reader(reader.from_json([request])) for request in sent]
    assert not parts or Tokens.concat(parts).counts == tokens.counts


@fuzz(200, request=requests(), column=st.integers(0, 30), value=hostile, place=st.none() | st.integers(0, 8))
def test_a_hostile_value_is_read_or_named(request, column, value, place):
    name = sorted(request)[column % len(request)]
    if place is not None and isinstance(request[name], list) and request[name]:
        request[name] = list(request[name])
        request[name][place % len(request[name])] = value
    else:
        request[name] = value
    _read_or_named(_reader("TimeBoundaries"), [shop.request(), request], name)


@fuzz(100, request=hostile | st.dictionaries(st.text(max_size=12), hostile, max_size=3))
def test_a_hostile_request_is_named(request):
    _read_or_named(_reader("TimeBoundaries"), [request], None)


@fuzz(60, text=st.binary(max_size=60) | st.sampled_from([b"[" * 60, b'{"a":' * 20, b'[{"request_time_s": NaN}]']))
def test_whatever_json_holds_is_named(text):
    try:
        sent = json.loads(text)
    except (ValueError, RecursionError):
        return
    _read_or_named(_reader("TimeBoundaries"), sent if isinstance(sent, list) else [sent], None)


arrays = st.sampled_from(
    [
        pa.array([None]),
        pa.array([1]),
        pa.array([1.5]),
        pa.array(["b"]),
        pa.array([b"\xff\xfe"]),
        pa.array([[1, 2]]),
        pa.array([[1, None]], pa.list_(pa.int8(), 2)),
        pa.array([[None, "b"]], pa.large_list(pa.large_string())),
        pa.array([["b", "b"]]).cast(pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        pa.array([[float("nan"), float("inf")]]),
        pa.array([[b"\xff", b"a"]]),
        pa.array([[["x"], None]]),
        pa.array([[[[1]], []]]),
        pa.array([[{"a": 1}, None]]),
        pa.array([[2**63, 1]], pa.list_(pa.uint64())),
        pa.array([[0, 1]], pa.list_(pa.timestamp("us"))),
        pa.array([None], pa.list_(pa.float64())),
        pa.array([[None, None]], pa.list_(pa.null())),
    ]
)


@fuzz(150, columns=st.dictionaries(st.integers(0, 30), arrays, min_size=1, max_size=3))
def test_parquet_columns_of_any_type_are_read_or_named(columns):
    reader = _reader("TimeBoundaries")
    table = reader.from_json([shop.request(candidate_tags=[["red"], None], history_latest_s=[None, 3])])
    for place, array in columns.items():
        name = table.column_names[place % table.num_columns]
        table = table.set_column(table.column_names.index(name), name, array)
    with clean_or_one_error() as errors:
        _is_whole(reader(table), 1)
    assert all(isinstance(error, RequestError) for error in errors), errors


def _read_or_named(reader: RequestReader, sent: list, name: str | None) -> None:
    with clean_or_one_error() as errors:
        _is_whole(reader(reader.from_json(sent)), len(sent))
    for error in errors:
        assert isinstance(error, RequestError), repr(error)
        assert 0 <= error.row < len(sent) and repr(error.column) in str(error)
        assert name is None or error.row == len(sent) - 1


def _is_whole(tokens: Tokens, num_requests: int) -> None:
    """Every row lies in its table, every number is finite, every column has its length."""
    assert len(tokens) == num_requests
    lengths = {"history": tokens.history_length_B.sum(), "candidate": tokens.candidate_count_B.sum()}
    assert len(tokens.history_time_s_T) == lengths["history"]
    for place, features in tokens.columns.items():
        for name, values in features.items():
            feature, flat = shop.manifest().feature(name), values
            if feature.is_bag:
                flat, offsets = values
                assert len(offsets) == lengths[place] + 1 and (np.diff(offsets) >= 1).all() and offsets[-1] == len(flat)
            else:
                assert len(flat) == lengths.get(place, num_requests)
            if feature.table is None:
                assert flat.dtype == np.float32 and np.isfinite(flat).all()
            else:
                size = shop.manifest().table(feature.table).num_rows
                assert flat.dtype == np.int64 and (flat >= 1).all() and (flat < size).all()


def _spelled(value) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(int(value)) if isinstance(value, float) else str(value).strip()
    return None if value is None or not text else text


def _visible(request: dict, is_cut_by_time: bool) -> list[int]:
    """The events that the request sees, oldest first, one by one."""
    latest = request.get("history.latest_s") or [None] * len(request["history.item"])
    known = [b if t is None else t for t, b in zip(request["history.time_s"], latest, strict=True)]
    known = [-math.inf if time_s is None else time_s for time_s in known]
    limit = request["request_time_s"] - is_cut_by_time
    return sorted((n for n, t in enumerate(known) if t == -math.inf or math.floor(t) <= limit), key=known.__getitem__)


def _unknown(request: dict, events: list[int]) -> int:
    """Counts the values that read row 1, value by value."""
    count = _spelled(request["context.tab"]) not in ROWS["tab"]
    for place, entries in (("history", events), ("candidate", range(len(request["candidate.item"])))):
        for entry in entries:
            item = _spelled(request[f"{place}.item"][entry])
            if item in ITEMS:
                author, brand, unknown_tags = ITEMS[item]
                count += (author is None) + (brand not in ROWS["brand"]) + unknown_tags
            else:
                names = [f"{place}.{name}" for name in ("author", "brand", "tags")]
                author, brand, tags = (request[name][entry] if name in request else None for name in names)
                tags = [tag for tag in map(_spelled, tags or []) if tag is not None] or [None]
                count += 1 + (_spelled(author) is None) + (_spelled(brand) not in ROWS["brand"])
                count += sum(tag not in ROWS["tags"] for tag in tags)
            if place == "history":
                count += _spelled(request["history.action"][entry]) not in ROWS["action"]
    return int(count)
