"""Raw requests to tokens: rows of every kind of table, visibility, order, limits, and an error for what is wrong."""

import numpy as np
import pyarrow as pa
import pytest

from gpsd_dist.data.hashing import hashed_rows
from gpsd_dist.serving import seen_ids
from gpsd_dist.serving.requests import Limits, RequestError
from gpsd_dist.serving.tokens import Tokens
from tests.unit.serving import shop


@pytest.fixture
def reader(tmp_path):
    return shop.reader(tmp_path)


def read(reader, *requests) -> Tokens:
    return reader(reader.from_json(requests))


def listed(values):
    return tuple(part.tolist() for part in values) if isinstance(values, tuple) else values.tolist()


def authors(*names):
    return hashed_rows(shop.ids(*names), 102).tolist()


def test_every_kind_of_feature_becomes_what_the_model_reads(reader):
    tokens = read(reader, shop.request())
    assert {name: listed(values) for name, values in tokens.columns["history"].items()} == {
        "item": [2, 3],
        "author": authors("anne", "bob"),
        "brand": [5, 1],  # Z has no row in the trained map
        "tags": ([2, 3, 1], [0, 2, 3]),
        "price": [1.0, -0.5],
        "action": [2, 1],
    }
    assert {name: listed(values) for name, values in tokens.columns["candidate"].items()} == {
        "item": [3, 1],
        "author": [*authors("bob"), 1],
        "brand": [1, 1],
        "tags": ([1, 1], [0, 1, 2]),
        "price": [-0.5, -0.5],  # a missing number is 0.0, before it is standardised
        "position": [0.0, 1.5],
    }
    assert {name: listed(values) for name, values in tokens.columns["context"].items()} == {"tab": [2], "age": [0.0]}
    assert tokens.columns["candidate"]["price"].dtype == np.float32
    assert (len(tokens), tokens.num_tokens) == (1, 4)
    assert tokens.history_time_s_T.tolist() == [10, 20] and tokens.request_time_s_B.tolist() == [100]


def test_unknown_values_are_counted(reader):
    tokens = read(reader, shop.request(), shop.request(candidate_item=["a", "a"], context_tab="x"))
    assert tokens.counts["unknown item"] == 1 and tokens.counts["unknown tab"] == 1
    assert tokens.counts["unknown brand"] == 4 and tokens.counts["unknown action"] == 2
    first = 1 + 1 + 3 + 3 + 1  # item, author, brand, tags, action
    second = 1 + 1 + 1 + 1  # brand, tags, action, tab
    assert tokens.unknown_ids_B.tolist() == [first, second]


def test_a_request_brings_the_attributes_of_items_that_are_not_known(reader):
    tokens = read(
        reader,
        shop.request(
            candidate_author=["cleo", "cleo"],
            candidate_tags=[["red"], ["blue", None, "red", "x"]],
            candidate_price=[9, 9],
        ),
        shop.request(candidate_tags=[None, []]),
    ).columns["candidate"]
    assert tokens["author"].tolist() == [*authors("bob", "cleo"), *authors("bob"), 1]
    assert listed(tokens["tags"]) == ([1, 1, 2, 3, 1, 1], [0, 1, 4, 5, 6])
    assert tokens["price"].tolist() == [-0.5, 4.0, -0.5, -0.5]


@pytest.mark.parametrize("column", ["history.action", "candidate.item", "candidate.author", "candidate.tags"])
def test_text_that_is_no_utf8_is_named_with_its_request(reader, column):
    sent = reader.from_json([shop.request(candidate_author=["a", "b"], candidate_tags=[["a"], ["b"]])] * 2)
    lists, values = sent[column].combine_chunks(), pa.array([b"ok", b" a", b"ok", b"\xe4"])
    text = pa.StringArray.from_buffers(len(values), *values.buffers()[1:])
    if column == "candidate.tags":
        text = pa.ListArray.from_arrays(lists.values.offsets, text)
    sent = sent.set_column(sent.column_names.index(column), column, pa.ListArray.from_arrays(lists.offsets, text))
    with pytest.raises(RequestError, match=rf"request 1, '{column}': found bytes that are no UTF-8 text"):
        reader(sent)


def test_events_are_ordered_and_those_of_the_future_dropped(reader):
    sent = shop.request(
        history_item=["7", "a", "b", "7", "a"],
        history_time_s=[30.5, None, 30.7, 100, 20.9],
        history_action=["view", "buy", "buy", "view", "view"],
    )
    tokens = read(reader, sent)
    assert tokens.columns["history"]["item"].tolist() == [2, 2, 4, 3]
    assert tokens.columns["history"]["action"].tolist() == [3, 2, 2, 3]
    assert tokens.history_time_s_T.tolist() == [-1, 20, 30, 30]
    assert tokens.dropped_events_B.tolist() == [1] and tokens.counts["events after the request"] == 1
    assert tokens.counts["events put in order"] == 5


def test_an_event_without_a_time_is_placed_at_its_latest_time(reader):
    sent = {"history_item": ["a", "b", "7"], "history_action": [None] * 3}
    late = shop.request(**sent, history_time_s=[None, 20, None], history_latest_s=[30, None, 100])
    assert read(reader, late).columns["history"]["item"].tolist() == [3, 2]
    assert read(reader, late).history_time_s_T.tolist() == [20, -1]


def test_the_last_events_are_kept(reader):
    sent = shop.request(history_item=["a", "b", "7"] * 2, history_time_s=range_of(6), history_action=[None] * 6)
    tokens = read(reader, sent, shop.request(history_item=[], history_time_s=[], history_action=[]))
    assert tokens.columns["history"]["item"].tolist() == [4, 2, 3, 4]
    assert tokens.history_length_B.tolist() == [4, 0] and tokens.counts["events over the limit"] == 2
    assert tokens.dropped_events_B.tolist() == [0, 0]


def range_of(number):
    return list(range(number))


def test_in_data_that_were_not_split_by_time_the_order_decides(tmp_path):
    reader = shop.reader(tmp_path, split_rule="LastItemByTime")
    tokens = read(reader, shop.request(history_time_s=[20, 100]))
    assert tokens.columns["history"]["item"].tolist() == [2, 3]
    assert read(reader, shop.request(history_time_s=[20, 101])).dropped_events_B.tolist() == [1]


def test_clients_may_spell_ids_as_numbers(reader):
    tokens = read(reader, shop.request(candidate_item=[7, 7.0]), shop.request(candidate_item=["7", " 7 "], user_id=7))
    assert tokens.columns["candidate"]["item"].tolist() == [4] * 4
    assert read(reader, shop.request(candidate_item=[True, None])).columns["candidate"]["item"].tolist() == [1, 1]


def test_parquet_columns_of_other_types_read_alike(reader):
    table = reader.from_json([shop.request(candidate_item=[7, 7])])
    table = table.set_column(
        table.column_names.index("candidate.item"),
        "candidate.item",
        pa.array([[7.0, 7.0]], pa.large_list(pa.float64())),
    )
    assert reader(table).columns["candidate"]["item"].tolist() == [4, 4]
    assert len(reader(table.slice(0, 0))) == 0 and len(read(reader)) == 0


def test_joined_requests_equal_requests_read_together(reader):
    made = [shop.request(candidate_tags=[None, ["red", "blue"]]), shop.request(history_item=["7", "b"]), shop.request()]
    together = read(reader, *made)
    joined = Tokens.concat([read(reader, made[0]), read(reader, *made[1:])])
    assert {place: {name: listed(v) for name, v in f.items()} for place, f in joined.columns.items()} == {
        place: {name: listed(v) for name, v in f.items()} for place, f in together.columns.items()
    }
    assert joined.counts == together.counts and joined.unknown_ids_B.tolist() == together.unknown_ids_B.tolist()


def test_ids_that_came_before_are_read_alike(tmp_path):
    """A reader that has seen some of the ids, or all, gives the tokens of one that has seen none."""
    requests = [
        shop.request(candidate_item=["b", None], candidate_author=["", " anne "]),
        shop.request(candidate_item=[" b", "new"], context_tab="x"),
        shop.request(history_item=["7", "a", "b"], history_time_s=[1, 2, 3], history_action=["buy", None, "buy "]),
    ]
    warm = shop.reader(tmp_path)
    for request in [*requests, *requests]:
        found, expected = read(warm, request), read(shop.reader(tmp_path), request)
        assert {p: {n: listed(v) for n, v in f.items()} for p, f in found.columns.items()} == {
            p: {n: listed(v) for n, v in f.items()} for p, f in expected.columns.items()
        }
        assert found.counts == expected.counts
    assert warm.seen.find("item", pa.array(["b", "7", "never"]))[0].tolist() == [3, 4, 0]


def test_a_bad_id_among_known_ones_is_named(tmp_path):
    reader = shop.reader(tmp_path, Limits(max_id_bytes=20))
    read(reader, shop.request(), shop.request())
    with pytest.raises(RequestError, match=r"request 1, 'history.item': an id of 21 bytes"):
        read(reader, shop.request(), shop.request(history_item=["a", "x" * 21]))
    with pytest.raises(RequestError, match=r"request 2, 'candidate.item': an id of 21 bytes"):
        read(reader, shop.request(), shop.request(), shop.request(candidate_item=["x" * 21, "b"]))


def test_ids_that_are_remembered_are_few_and_short(monkeypatch):
    monkeypatch.setattr(seen_ids, "_IDS_KEPT", 10)
    seen = seen_ids.SeenIds()
    for first in range(0, 40, 4):
        texts = pa.array([str(first + i) for i in range(4)])
        assert seen.find("item", texts)[1].tolist() == [0, 1, 2, 3]
        seen.add("item", texts, np.arange(2, 6))
        assert seen.find("item", texts)[0].tolist() == [2, 3, 4, 5] and len(seen.find("author", texts)[1]) == 4
        assert sum(map(len, seen._indices.values())) <= 10
    seen.add("item", pa.array(["x" * 1000]), np.array([7]))
    assert seen.find("item", pa.array(["x" * 1000]))[0].tolist() == [0]


NAN = float("nan")
WRONG = {
    "unknown column": ("history.colour", {"history_colour": ["red", "red"]}, "no such column"),
    "missing column": ("history.time_s", {"history_time_s": "ABSENT"}, "is missing"),
    "no candidates": ("candidate.item", {"candidate_item": [], "candidate_position": []}, "no candidate"),
    "too many": ("candidate.item", {"candidate_item": ["a"] * 6, "candidate_position": [0] * 6}, "at most 5"),
    "too many events": ("history.item", {"history_item": ["a"] * 9}, "at most 8"),
    "lengths": ("history.action", {"history_action": ["view"]}, "found 1 entries, expected 2 as in 'history.item'"),
    "no list": ("candidate.item", {"candidate_item": "b"}, "expected a list"),
    "null list": ("candidate.item", {"candidate_item": None}, "found null"),
    "id is a list": ("candidate.item", {"candidate_item": [["b"], "a"]}, "found list"),
    "long id": ("candidate.item", {"candidate_item": ["b", "x" * 21]}, "an id of 21 bytes"),
    "surrogate": ("candidate.item", {"candidate_item": ["b", "\ud800"]}, "surrogates not allowed"),
    "float id": ("candidate.item", {"candidate_item": [2.0**60, 1]}, "write long numbers as text"),
    "NaN id": ("candidate.item", {"candidate_item": [NAN, 1]}, "expected an id"),
    "NaN": ("candidate.position", {"candidate_position": [0, NAN]}, "expected a finite number"),
    "infinite": ("context.age", {"context_age": float("inf")}, "expected a finite number"),
    "beyond float32": ("context.age", {"context_age": 1e39}, "expected a finite number"),
    "beyond float64": ("context.age", {"context_age": 10**400}, "expected a finite number"),
    "text": ("context.age", {"context_age": "7"}, "found str '7', expected a number"),
    "bool": ("context.age", {"context_age": True}, "expected a number"),
    "milliseconds": ("request_time_s", {"request_time_s": 1_700_000_000_000}, "divided by 1,000"),
    "negative time": ("history.time_s", {"history_time_s": [-1, 3]}, "expected epoch seconds"),
    "no request time": ("request_time_s", {"request_time_s": None}, "is null"),
    "bag is no list": ("candidate.tags", {"candidate_tags": ["red", "red"]}, "expected a list"),
    "big bag": ("candidate.tags", {"candidate_tags": [[], ["red"] * 4]}, "a bag of 4 values, expected at most 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_column_and_request(tmp_path, case):
    column, changes, message = WRONG[case]
    limits = Limits(max_candidates=5, max_events=8, max_bag_values=3, max_id_bytes=20)
    reader = shop.reader(tmp_path, limits)
    with pytest.raises(RequestError) as caught:
        read(reader, shop.request(), shop.request(**changes))
    assert (caught.value.column, caught.value.row) == (column, 1)
    assert message in str(caught.value)


@pytest.mark.parametrize("request_", [None, [], "x", 3])
def test_a_request_that_is_no_object_is_refused(reader, request_):
    with pytest.raises(RequestError, match="expected an object"):
        reader.from_json([shop.request(), request_])


@pytest.mark.parametrize(
    ("column", "array", "message"),
    [
        ("candidate.item", pa.array(["a"]), "expected a list"),
        ("candidate.position", pa.array([["0", "1"]]), "expected a number"),
        ("request_time_s", pa.array([1], pa.timestamp("s")), "expected epoch seconds"),
        ("candidate.tags", pa.array([["red", "red"]]), "expected a list of ids per value"),
        ("context.tab", pa.array([{"a": 1}]), "expected text or numbers"),
    ],
)
def test_a_parquet_column_of_a_wrong_type_is_refused(reader, column, array, message):
    table = reader.from_json([shop.request(candidate_tags=[[], []])])
    with pytest.raises(RequestError, match=message):
        reader(table.set_column(table.column_names.index(column), column, array))


def test_a_column_that_stands_there_twice_is_refused(reader):
    table = reader.from_json([shop.request()])
    with pytest.raises(RequestError, match="stands there 2 times"):
        reader(table.append_column("context.age", table["context.age"]))


def test_errors_in_later_batches_count_from_the_first_request(reader):
    sent = [shop.request() for _ in range(7)]
    assert [len(tokens) for tokens in reader.batches(reader.from_json(sent), 3)] == [3, 3, 1]
    with pytest.raises(RequestError, match="request 5, "):
        list(reader.batches(reader.from_json([*sent[:5], shop.request(context_age=1e39), sent[6]]), 2))


def test_values_are_read_as_those_of_the_log_were(tmp_path):
    reading = {"null_words": ["NULL"], "whole": ["item"], "clip": {"position": [1.0, 2.0], "age": [5.0, 9.0]}}
    reader = shop.reader(tmp_path, reading=reading)
    sent = shop.request(
        candidate_item=["7.0", "a.0"], candidate_position=[0.5, 3], context_tab="NULL", candidate_author=[None, "NULL"],
        candidate_tags=[[], ["NULL", "red"]], history_action=["view.0", "buy"],
    )  # fmt: skip
    tokens = read(reader, sent)
    assert tokens.columns["candidate"]["item"].tolist() == [4, 2]
    assert tokens.columns["candidate"]["position"].tolist() == [1.0, 2.0]
    assert tokens.columns["context"]["age"].tolist() == [0.0]  # a missing number is not cut off
    assert tokens.columns["context"]["tab"].tolist() == [1]
    assert tokens.columns["history"]["action"].tolist() == [1, 3]
    new = read(reader, sent | {"candidate.item": ["new", "new"]}).columns["candidate"]
    assert listed(new["tags"]) == ([1, 2], [0, 1, 2]) and new["author"].tolist() == [1, 1]


NO_RULES = [3, {"clip": {"age": 3}}, {"clip": {"age": ["a", 1]}}, {"whole": [1]}, {"null_words": 1}]


@pytest.mark.parametrize("reading", NO_RULES)
def test_rules_that_are_none_are_refused(tmp_path, reading):
    with pytest.raises(ValueError, match="build it again"):
        shop.reader(tmp_path, reading=reading)
