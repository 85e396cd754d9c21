"""Reads raw requests: raw values under the names of the Parquet columns -> `Tokens`.

A request: {"user_id": "u1", "request_time_s": 1399161600, "history.item": ["8001", ...], "history.time_s": [...],
"candidate.item": [...], "context.<feature>": value}, and `history.<feature>`, `candidate.<feature>` for what is no
attribute of an item. Attributes come from the artefact; a request may bring those of items that it does not know.

Shape letters: B requests, E events as sent, T history tokens, C candidates, N values.
"""

import collections
import dataclasses
import difflib
import itertools
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist import features
from gpsd_dist.batch.packing import cuts
from gpsd_dist.batch.row_layout import ranges
from gpsd_dist.data.gather import one_chunk
from gpsd_dist.data.hashing import hashed_rows
from gpsd_dist.features import Values
from gpsd_dist.schema import PLACES, UNKNOWN_INDEX, Feature, Manifest
from gpsd_dist.serving.artefact import MAX_CANDIDATES
from gpsd_dist.serving.counters import Counters
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.seen_ids import SeenIds
from gpsd_dist.serving.tokens import Tokens
from gpsd_dist.serving.vocabulary import Vocabulary

USER, REQUEST_TIME, HISTORY_TIME = "user_id", "request_time_s", "history.time_s"
LATEST = "history.latest_s"
"""Optional: an event without a time happened no later than this (epoch seconds)."""
_BEFORE_EVERYTHING_S = -(2**62)
_END_S = 10**12  # far beyond the year 10000; a time in milliseconds lies above it
_NAMES_KEPT = 100  # sets of columns that clients send; untuned
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class RequestError(ValueError):
    """Says what is wrong with which column of which request (counted from 0)."""

    def __init__(self, column: str, row: int, message: str):
        super().__init__(f"request {row}, {column!r}: {message}")
        self.column, self.row, self.reason = column, row, message


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds what one request may ask for. All untuned."""

    max_candidates: int = MAX_CANDIDATES
    max_events: int = 10_000
    """Events as sent; the model reads the last `max_history_length`."""
    max_bag_values: int = 1_000
    max_id_bytes: int = 1_000


@dataclasses.dataclass(frozen=True)
class _Lists:
    """Holds one column of lists: the values of request i are values[offsets[i] : offsets[i + 1]]."""

    name: str
    values: pa.Array
    offsets: np.ndarray

    def error(self, entry: int, message: str) -> RequestError:
        """Names the request that the value at `entry` belongs to."""
        return RequestError(self.name, int(np.searchsorted(self.offsets, entry, side="right")) - 1, message)


class RequestReader:
    """Turns raw requests into tokens by the rules that the training data were built by.

    - Visibility: an event at or after the time of its request, in whole seconds, is dropped. Where the data were not
      split by time, the order decides, and an event may carry the time of the request.
    - Order: by time, fractions of a second included; unknown times first (or at `history.latest_s`), equal times as
      they come. The last `manifest.max_history_length` events are kept.
    - A value that is missing or not known is the unknown row, 0.0, or the bag [1].
    """

    def __init__(
        self,
        manifest: Manifest,
        vocabularies: typing.Mapping[str, Vocabulary],
        items: Items,
        limits: Limits,
        with_candidates: bool = True,
        counters: Counters | None = None,
    ):
        """`manifest`: as served. `vocabularies`: of all tables but hashed ones, whose rows need none.

        `counters` give the counts of earlier events that a request does not bring.
        `with_candidates` False: reads users and histories alone; columns of candidates and context are passed over.
        """
        self.manifest, self._vocabularies, self.items, self.limits = manifest, vocabularies, items, limits
        self.rules, self.counters = features.Rules.of(manifest), counters
        self._is_cut_by_time = manifest.options.get("split_rule", "TimeBoundaries") == "TimeBoundaries"
        every = {f"{place}.{f.name}": f for place in PLACES for f in manifest.features_in(place)}
        self._with_candidates = with_candidates
        self._features = {name: f for name, f in every.items() if with_candidates or name.startswith("history.")}
        self._passed_over = every.keys() - self._features.keys()
        self._optional = {
            column
            for column, feature in self._features.items()
            if (feature.name in items.attributes and not column.startswith("context."))
            or (feature.counts is not None and counters is not None)
        } | {USER, LATEST}
        self.columns = (USER, REQUEST_TIME, HISTORY_TIME, LATEST, *self._features)
        """Names of all columns that a request may have."""
        self._right_names: set[frozenset[str]] = set()
        self.seen = SeenIds()

    def from_json(self, requests: typing.Sequence[dict[str, typing.Any]]) -> pa.Table:
        """Makes a table of decoded JSON objects: ids as text, numbers as float64, times as they are.

        RequestError for an unknown or missing key, and for a value of a wrong type.
        """
        for row, request in enumerate(requests):
            if not isinstance(request, dict):
                raise RequestError("", row, f"found {_shown(request)}, expected an object")
            self._check_names(request, row)
        given = [name for name in self.columns if any(name in request for request in requests)]
        needed = [name for name in self.columns if name not in self._optional]
        columns = {}
        for name in dict.fromkeys([*given, *needed]):
            values = [request.get(name) for request in requests]
            columns[name] = _column(name, values, self._features.get(name))
        return pa.table(columns)

    def __call__(self, requests: pa.Table) -> Tokens:
        """Reads requests, columns of any Arrow type that holds such values. RequestError for the first bad value."""
        self._check_names(requests.column_names, 0)
        reading = _Reading(requests, self.limits, self.rules)
        time_B = reading.times(REQUEST_TIME, may_be_null=not self._is_cut_by_time)
        item = self.manifest.item_feature
        sent = reading.lists(f"history.{item}", self.limits.max_events)
        history = self._visible(reading, sent, time_B)
        encoder = _Encoder(self, reading)
        columns: dict[str, dict[str, Values]] = {"history": encoder.tokens("history", sent, history.chosen, time_B)}
        columns |= {"candidate": {item: np.zeros(0, np.int64)}, "context": {}}
        count_B = np.zeros(len(time_B), np.int64)
        if self._with_candidates:
            shown = reading.lists(f"candidate.{item}", self.limits.max_candidates)
            count_B = np.diff(shown.offsets)
            if len(count_B) and not count_B.min():
                raise RequestError(shown.name, int(np.argmin(count_B)), "found no candidate, expected at least one")
            columns |= {"candidate": encoder.tokens("candidate", shown, None, time_B), "context": encoder.context()}
        lengths = {"history": history.length_B, "candidate": count_B, "context": np.ones(len(count_B), np.int64)}
        unknown_B = np.zeros(len(count_B), np.int64)
        for place, found in columns.items():
            for name, values in found.items():
                if self.manifest.feature(name).table is not None:
                    num_B = _unknown(values, lengths[place])
                    unknown_B += num_B
                    reading.counts[f"unknown {name}"] += int(num_B.sum())
        return Tokens(
            history_length_B=history.length_B,
            candidate_count_B=count_B,
            columns=columns,
            history_time_s_T=history.time_s_T,
            request_time_s_B=time_B,
            unknown_ids_B=unknown_B,
            dropped_events_B=history.dropped_B,
            counts=dict(reading.counts),
        )

    def batches(self, requests: pa.Table, size: int) -> typing.Iterator[Tokens]:
        """Reads `size` requests at a time. RequestError counts them from the first one of the table."""
        for start in range(0, len(requests), size):
            try:
                tokens = self(requests.slice(start, size))
            except RequestError as error:
                raise RequestError(error.column, error.row + start, error.reason) from error
            yield tokens

    def encode(self, feature: Feature, raw: pa.StringArray) -> np.ndarray:
        """Finds spelled ids' indices, or 64-bit ids where the table has no vocabulary, as the data hold them: int64."""
        return self.indexed(feature, self.hashed(feature, raw))

    def hashed(self, feature: Feature, raw: pa.StringArray) -> np.ndarray:
        """Hashes spelled ids: int64 [N]."""
        return features.id_of(self.rules.spelled(feature, raw))

    def indexed(self, feature: Feature, id_N: np.ndarray) -> np.ndarray:
        """Finds the indices of hashed ids, as `encode` does."""
        is_unbounded = feature.table in self.manifest.unbounded
        return id_N if is_unbounded else self._vocabularies[typing.cast(str, feature.table)].rows(id_N)

    def served(self, feature: Feature, values: np.ndarray) -> np.ndarray:
        """Turns values as the data hold them into what the model reads: table rows, or standardised numbers."""
        if feature.table is None:
            return features.standardise(feature, values)
        kind = self.manifest.unbounded.get(feature.table)
        if kind == "hashed":
            return hashed_rows(values, self.manifest.table(feature.table).num_rows)
        return values if kind is None else self._vocabularies[feature.table].rows(values)

    def is_attribute(self, feature: Feature) -> bool:
        """Says whether the artefact has the feature for every known item."""
        return feature.name in self.items.attributes

    def _check_names(self, names: typing.Collection[str], row: int) -> None:
        found = frozenset(names)
        if len(found) == len(names) and found in self._right_names:
            return
        given, names = collections.Counter(list(names)), found
        twice = [name for name, count in given.items() if count > 1]
        if twice:
            raise RequestError(twice[0], row, f"stands there {given[twice[0]]} times, expected once")
        unknown = sorted(names - set(self.columns) - self._passed_over, key=str)
        if unknown:
            name = str(unknown[0])[:100]
            near = difflib.get_close_matches(name, self.columns, 1) or [f"some of {list(self.columns)}"]
            raise RequestError(name, row, f"no such column; expected {near[0]}")
        absent = [name for name in self.columns if name not in names and name not in self._optional]
        if absent:
            raise RequestError(absent[0], row, "is missing; send null where a value is not known, or []")
        if len(self._right_names) < _NAMES_KEPT:
            self._right_names.add(found)

    def _visible(self, reading: "_Reading", sent: _Lists, time_B: np.ndarray) -> "_History":
        """Drops what the request may not see, orders the rest, keeps the latest."""
        length_B = np.diff(sent.offsets)
        owner_E = np.repeat(np.arange(len(length_B)), length_B)
        time_E = reading.list_times(HISTORY_TIME, sent)
        known_E = time_E
        if reading.has(LATEST):
            known_E = np.where(np.isneginf(time_E), reading.list_times(LATEST, sent), time_E)
        order_E = np.lexsort((known_E, owner_E))  # stable: equal times stay as they come
        known_s_E, until_E = np.floor(known_E), time_B[owner_E]
        is_seen_E = (known_s_E < until_E) if self._is_cut_by_time else (known_s_E <= until_E)
        seen_E = order_E[is_seen_E[order_E]]
        seen_B = np.bincount(owner_E[seen_E], minlength=len(length_B))
        kept_B = np.minimum(seen_B, self.manifest.max_history_length)
        entry_T = seen_E[ranges(np.cumsum(seen_B) - kept_B, kept_B)]
        reading.counts["events after the request"] += int((~is_seen_E).sum())
        reading.counts["events over the limit"] += int((seen_B - kept_B).sum())
        reading.counts["events put in order"] += int((order_E != np.arange(len(order_E))).sum())
        time_T = np.maximum(time_E[entry_T], -1)  # -1: unknown
        is_as_sent = np.array_equal(entry_T, np.arange(len(time_E)))
        return _History(None if is_as_sent else entry_T, kept_B, length_B - seen_B, np.floor(time_T).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class _History:
    chosen: np.ndarray | None
    """Entry of every kept event among those sent (int64 [T]); None: all, as they came."""
    length_B: np.ndarray
    dropped_B: np.ndarray
    time_s_T: np.ndarray


class _Encoder:
    """Encodes the features of one table of requests."""

    def __init__(self, reader: RequestReader, reading: "_Reading"):
        self.reader, self.reading = reader, reading

    def tokens(self, place: str, item: _Lists, entry_N: np.ndarray | None, time_B: np.ndarray) -> dict[str, Values]:
        """Reads the features of history or candidates at the entries of the item column (None: all)."""
        manifest, counters, found = self.reader.manifest, self.reader.counters, {}
        item_feature = manifest.feature(manifest.item_feature)
        counts = counters is not None and any(feature.counts is not None for feature in manifest.features_in(place))
        if counts:
            raw_N = item.values if entry_N is None else item.values.take(pa.array(entry_N))
            id_N = self.reader.hashed(item_feature, self.reading.ids(raw_N, _Chosen(item, entry_N)))
            index_N = self.reader.indexed(item_feature, id_N)
        else:
            index_N = typing.cast(np.ndarray, self._encoded(item_feature, item, entry_N))
        place_N = self.reader.items.places(index_N)
        chosen = slice(None) if entry_N is None else entry_N
        for feature in manifest.features_in(place):
            column = f"{place}.{feature.name}"
            brought: Values | None = None
            values: Values | None
            if feature is not item_feature and self.reading.has(column):
                sent = self.reading.lists(column, like=item)
                brought = self._encoded(feature, sent, entry_N)
            if feature is item_feature:
                values = index_N
            elif self.reader.is_attribute(feature):
                values = self.reader.items.take(feature, place_N)
                values = values if brought is None else _either(place_N >= 0, values, brought)
            elif feature.counts is not None and counters is not None:
                time_N = np.repeat(time_B, np.diff(item.offsets))[chosen]
                values = counters.count(feature, id_N, time_N, self._value_ids(place, feature.counts, item, entry_N))
                if brought is not None:  # by some of the clients whose requests were joined
                    is_there_E = sent.values.is_valid().to_numpy(zero_copy_only=False)
                    values = np.where(is_there_E[chosen], brought, values)
            else:
                values = brought
            found[feature.name] = self._served(feature, values)
        return found

    def _value_ids(self, place: str, name: str, item: _Lists, entry_N: np.ndarray | None) -> np.ndarray | None:
        """Hashes the values that requests bring of an attribute of their items: int64 [N]; None if they bring none."""
        feature, column = self.reader.manifest.feature(name), f"{place}.{name}"
        if name == self.reader.manifest.item_feature or not self.reading.has(column):
            return None
        sent = self.reading.lists(column, like=item)
        array = sent.values if entry_N is None else sent.values.take(pa.array(entry_N))
        return self.reader.hashed(feature, self.reading.ids(array, _Chosen(sent, entry_N)))

    def context(self) -> dict[str, Values]:
        """Reads one value, or one bag, per request."""
        found = {}
        for feature in self.reader.manifest.features_in("context"):
            column = self.reading.column(f"context.{feature.name}")
            lists = _Lists(f"context.{feature.name}", column, np.arange(len(column) + 1))
            found[feature.name] = self._served(feature, self._encoded(feature, lists, None))
        return found

    def _served(self, feature: Feature, values: Values) -> Values:
        if isinstance(values, tuple):
            return self.reader.served(feature, values[0]), values[1]
        return self.reader.served(feature, values)

    def _encoded(self, feature: Feature, column: _Lists, entry_N: np.ndarray | None) -> Values:
        """Encodes raw values at the entries (None: all) as the data set would hold them."""
        array = column.values if entry_N is None else column.values.take(pa.array(entry_N))
        chosen = _Chosen(column, entry_N)
        if feature.kind == "numerical":
            return self.reading.numbers(feature, array, chosen)
        if not feature.is_bag:
            return self._indices(feature, array, chosen)
        if not _is_list(array.type):
            raise column.error(0, f"found {array.type}, expected a list of ids per value")
        owner_M = pc.list_parent_indices(array).to_numpy()
        members = self.reading.ids(array.flatten(), _Chosen(column, owner_M if entry_N is None else entry_N[owner_M]))
        size_N = np.bincount(owner_M, minlength=len(array))
        if len(size_N) and size_N.max() > self.reading.limits.max_bag_values:
            given = f"a bag of {size_N.max()} values, expected at most {self.reading.limits.max_bag_values}"
            raise chosen.error(int(np.argmax(size_N)), given)
        is_there_M = members.is_valid().to_numpy(zero_copy_only=False)
        return _bags(self.reader.encode(feature, members)[is_there_M], owner_M[is_there_M], len(array))

    def _indices(self, feature: Feature, array: pa.Array, chosen: "_Chosen") -> np.ndarray:
        """Encodes one id per value: int64 [N]. Those that came lately are not spelled and hashed again."""
        if not isinstance(array, pa.StringArray):
            return self.reader.encode(feature, self.reading.ids(array, chosen))
        try:
            index_N, new_M = self.reader.seen.find(feature.name, array)
        except UnicodeDecodeError:  # a Parquet file may hold any bytes as text; this names them
            return self.reader.encode(feature, self.reading.ids(array, chosen))
        if len(new_M):
            new = array.take(pa.array(new_M))
            index_N[new_M] = self.reader.encode(feature, self.reading.ids(new, chosen.part(new_M)))
            self.reader.seen.add(feature.name, new, index_N[new_M])
        return index_N


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Remembers which entries of a column values were taken from, for error messages."""

    column: _Lists
    entry_N: np.ndarray | None
    """None: all of them."""

    def part(self, place_M: np.ndarray) -> "_Chosen":
        """Remembers the values at some places of these."""
        return _Chosen(self.column, place_M if self.entry_N is None else self.entry_N[place_M])

    def error(self, place: int, message: str) -> RequestError:
        has_entry = self.entry_N is not None and len(self.entry_N) > 0
        return self.column.error(int(self.entry_N[place]) if has_entry else place, message)


class _Reading:
    """Reads and checks the columns of one table of requests."""

    def __init__(self, requests: pa.Table, limits: Limits, rules: features.Rules):
        self.requests, self.limits, self.rules = requests, limits, rules
        self.counts: collections.Counter[str] = collections.Counter()
        self._names = frozenset(requests.column_names)

    def has(self, name: str) -> bool:
        return name in self._names

    def column(self, name: str) -> pa.Array:
        return one_chunk(self.requests[name])

    def lists(self, name: str, limit: int | None = None, like: _Lists | None = None) -> _Lists:
        """Reads a column of lists of at most `limit` entries, or as many as `like` has in each request.

        A null list in a column that is `like` another means that nothing is known of any entry.
        """
        array = self.column(name)
        if not _is_list(array.type) and not pa.types.is_null(array.type):
            raise RequestError(name, 0, f"found {array.type}, expected a list")
        if pa.types.is_null(array.type):
            array = array.cast(pa.list_(pa.string()))
        if like is not None and pa.types.is_list(array.type) and not array.null_count:  # as most clients send it
            cuts_B1 = array.offsets.to_numpy()
            if np.array_equal(cuts_B1 - cuts_B1[0], like.offsets):
                return _Lists(name, array.flatten(), like.offsets)
        is_null_B = array.is_null().to_numpy(zero_copy_only=False)
        length_B = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
        offsets, values = cuts(length_B), array.flatten()
        if like is None:
            if is_null_B.any():
                raise RequestError(name, int(np.argmax(is_null_B)), "found null, expected a list; send [] for none")
            if limit is not None and len(length_B) and length_B.max() > limit:
                row = int(np.argmax(length_B > limit))
                raise RequestError(name, row, f"found {length_B[row]} entries, expected at most {limit}; send fewer")
            return _Lists(name, values, offsets)
        expected_B = np.diff(like.offsets)
        is_wrong_B = ~is_null_B & (length_B != expected_B)
        if is_wrong_B.any():
            row = int(np.argmax(is_wrong_B))
            given = f"found {length_B[row]} entries, expected {expected_B[row]} as in {like.name!r}"
            raise RequestError(name, row, f"{given}; send null for a value that is not known")
        if is_null_B.any():  # as many nulls as the other column has entries
            entry = np.arange(len(like.values)) - np.repeat(like.offsets[:-1] - offsets[:-1], expected_B)
            is_absent = np.repeat(is_null_B, expected_B)
            values = values.take(pa.array(np.where(is_absent, 0, entry), mask=is_absent))
        return _Lists(name, values, like.offsets)

    def times(self, name: str, may_be_null: bool) -> np.ndarray:
        """Reads one time per request: int64 [B] epoch seconds; before everything where null."""
        column = self.column(name)
        lists = _Lists(name, column, np.arange(len(column) + 1))
        if column.null_count and not may_be_null:
            raise lists.error(int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), "is null")
        return np.maximum(np.floor(_times(lists)), _BEFORE_EVERYTHING_S).astype(np.int64)

    def list_times(self, name: str, like: _Lists) -> np.ndarray:
        """Reads one time per event: float64 [E] epoch seconds, which may have a fraction, -inf where null."""
        return _times(self.lists(name, like=like))

    def ids(self, array: pa.Array, chosen: _Chosen) -> pa.StringArray:
        """Spells ids."""
        try:
            found = self.rules.missing(features.raw_ids(array))
        except ValueError as error:
            raise chosen.error(_first_undecodable(array), str(error)) from error
        if not len(found) or features.text_bytes(found).max() <= self.limits.max_id_bytes:
            return found
        size = pc.max(pc.binary_length(found)).as_py() or 0
        if size > self.limits.max_id_bytes:
            place = pc.index(pc.binary_length(found), size).as_py()
            raise chosen.error(place, f"an id of {size} bytes, expected at most {self.limits.max_id_bytes}")
        return found

    def numbers(self, feature: Feature, array: pa.Array, chosen: _Chosen) -> np.ndarray:
        """Reads numbers as the data hold them: cut off as those were, float32 [N], 0.0 where null."""
        kind = array.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise chosen.error(0, f"found {kind}, expected a number")
        values = _floats(array, 0.0)
        is_bad = ~(np.abs(values) <= _FLOAT32_MAX)
        if is_bad.any():
            place = int(np.argmax(is_bad))
            raise chosen.error(place, f"found {values[place]}, expected a finite number, or null where it is missing")
        if feature.name in self.rules.clip:
            is_there = array.is_valid().to_numpy(zero_copy_only=False)
            values = np.where(is_there, np.clip(values, *self.rules.clip[feature.name]), 0.0)
        return (values + 0.0).astype(np.float32)  # -0.0 + 0.0 is 0.0, as the data have it


def _times(times: _Lists) -> np.ndarray:
    """Reads epoch seconds: float64 [N], -inf where null. A double holds every microsecond below 10^9.9 s."""
    kind = times.values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise times.error(0, f"found {kind}, expected epoch seconds, a number")
    values = _floats(times.values, 0.0)
    is_bad = ~((values >= 0) & (values < _END_S))
    if is_bad.any():
        place = int(np.argmax(is_bad))
        given = f"found {values[place]}, expected epoch seconds, 0 .. {_END_S - 1}"
        raise times.error(place, f"{given}; milliseconds must be divided by 1,000")
    if not times.values.null_count:
        return values
    return np.where(times.values.is_null().to_numpy(zero_copy_only=False), -np.inf, values)


def _first_undecodable(array: pa.Array) -> int:
    """Finds the first text that is not UTF-8; 0 where there is none."""
    kind = array.type
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind)):
        return 0
    for place, content in enumerate(array.cast(pa.binary()).to_pylist()):
        try:
            (content or b"").decode()
        except UnicodeDecodeError:
            return place
    return 0


def _floats(array: pa.Array, missing: float) -> np.ndarray:
    """Returns numbers of any type as float64."""
    array = array if array.type == pa.float64() else array.cast(pa.float64(), safe=False)
    return (pc.fill_null(array, missing) if array.null_count else array).to_numpy()


def _bags(value_M: np.ndarray, owner_M: np.ndarray, num_bags: int) -> Values:
    """Makes bags, their values in ascending order; an empty one holds the unknown index."""
    size_N = np.bincount(owner_M, minlength=num_bags)
    is_empty_N = size_N == 0
    value_M = np.concatenate([value_M, np.full(int(is_empty_N.sum()), UNKNOWN_INDEX)])
    owner_M = np.concatenate([owner_M, np.flatnonzero(is_empty_N)])
    return value_M[np.lexsort((value_M, owner_M))], cuts(size_N + is_empty_N)


def _either(is_first_N: np.ndarray, first: Values, second: Values) -> Values:
    """Takes each value of `first` or `second`."""
    if not isinstance(first, tuple) or not isinstance(second, tuple):
        return np.where(is_first_N, first, second)
    size_N = np.where(is_first_N, np.diff(first[1]), np.diff(second[1]))
    start_N = np.where(is_first_N, first[1][:-1], second[1][:-1] + len(first[0]))
    return np.concatenate([first[0], second[0]])[ranges(start_N, size_N)], cuts(size_N)


def _unknown(values: Values, length_B: np.ndarray) -> np.ndarray:
    """Counts the values of each request that read the unknown row: int64 [B]."""
    rows, ends = values if isinstance(values, tuple) else (values, None)
    is_unknown = rows == UNKNOWN_INDEX
    if not is_unknown.any():
        return np.zeros(len(length_B), np.int64)
    stops = cuts(length_B)
    return np.diff(cuts(is_unknown)[stops if ends is None else ends[stops]])


def _column(name: str, values: list, feature: Feature | None) -> pa.Array:
    """Makes one typed column of decoded JSON values, one per request."""
    place, is_bag = name.split(".")[0], feature is not None and feature.is_bag
    kind = _numbers if (feature is None and name != USER) or (feature is not None and feature.table is None) else _texts
    depth = (place in ("history", "candidate")) + is_bag
    return _nested(name, values, list(range(len(values))), depth, kind)


def _nested(name: str, values: list, row_N: list[int], depth: int, kind: typing.Callable) -> pa.Array:
    """Makes an array of lists of lists, `depth` levels of them; `row_N`: the request that each value belongs to."""
    if not depth:
        return kind(name, values, row_N)
    for row, value in zip(row_N, values, strict=True):
        if value is not None and not isinstance(value, list):
            raise RequestError(name, row, f"found {_shown(value)}, expected a list")
    lengths = [len(value or ()) for value in values]
    inner_rows = list(itertools.chain.from_iterable(map(itertools.repeat, row_N, lengths)))
    inner = _nested(name, list(itertools.chain.from_iterable(v or () for v in values)), inner_rows, depth - 1, kind)
    offsets, is_null = pa.array([0, *itertools.accumulate(lengths)], pa.int32()), [value is None for value in values]
    return pa.ListArray.from_arrays(offsets, inner, mask=pa.array(is_null, pa.bool_()) if any(is_null) else None)


def _texts(name: str, values: list, row_N: list[int]) -> pa.StringArray:
    """Spells ids of mixed types: each request may come from another client."""
    try:
        if {str, type(None)}.issuperset(map(type, values)):
            return pa.array(values, pa.string())
    except ValueError:  # a lone surrogate: found below
        pass
    texts = []
    for row, value in zip(row_N, values, strict=True):
        try:
            if not isinstance(value, str | int | float | None) or value != value:
                raise ValueError(f"found {_shown(value)}, expected an id, text or a number")
            if isinstance(value, float):
                value = features.raw_ids(pa.array([value]))[0].as_py()
            elif isinstance(value, int):
                value = str(value).lower()  # True: "true", as the spelling of booleans is
            texts.append(pa.array([value], pa.string()))
        except ValueError as error:
            raise RequestError(name, row, f"{error}") from error
    return pa.concat_arrays(texts) if texts else pa.array([], pa.string())


def _numbers(name: str, values: list, row_N: list[int]) -> pa.DoubleArray:
    types = set(map(type, values))
    if not types <= {int, float, type(None)}:
        for row, value in zip(row_N, values, strict=True):
            if type(value) not in (int, float, type(None)):
                raise RequestError(name, row, f"found {_shown(value)}, expected a number")
    try:
        if type(None) not in types:
            return pa.array(np.array(values, np.float64))
        return pa.array([value if value is None else float(value) for value in values], pa.float64())
    except OverflowError as error:
        row = next(
            row for row, value in zip(row_N, values, strict=True) if isinstance(value, int) and abs(value) >= 2**1023
        )
        raise RequestError(name, row, f"{error}; expected a finite number") from error


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _shown(value: typing.Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"
