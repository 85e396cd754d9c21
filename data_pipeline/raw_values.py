"""Turns raw columns, as they stand in files, into the values that the pipeline works with: Arrow arrays in and out.

A conversion gives the values (null where there is none) and a mask of those that cannot be read as what the column
should hold. All engines and all kinds of files share the conversions, so that a value means the same everywhere.
"""

import collections
import dataclasses
import functools
import json
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist import features

EARLIEST_S, LATEST_S = 631_152_000, 4_102_444_800  # 1990 and 2100: a time outside of them is hardly one
END_OF_TIME_S = 253_402_300_800  # the year 10000
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
MISSING_WORDS = ("nan", "NaN", "NULL", "null", "\\N", "<NA>")
"""Words that tools write for a missing value, and that hardly anybody gives to a user, an item or a category."""
SUSPECT_WORDS = ("NA", "N/A", "n/a", "None", "none", "undefined", "nil", "-", "?")
"""Words that may mean a missing value, or may be one: they are taken as they are, and counted."""
_CLOCK = r"(?:[Tt ](?P<clock>\d{2}:\d{2}(?::\d{2})?)(?:[.,](?P<fraction>\d{1,9}))?)?"
_ISO = rf"^(?P<day>\d{{4}}-\d{{2}}-\d{{2}}){_CLOCK}\s*(?P<zone>[+-]\d{{2}}(?::?\d{{2}})?|[A-Za-z][A-Za-z0-9_+/-]*)?$"
_ZONED = r"[T ].*([+-]\d{2}(:?\d{2})?|[A-Za-z])$|[A-Za-z]{3,}$"
_INVISIBLE = r"[\x{200B}-\x{200F}\x{2060}\x{FEFF}]"
MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9  # of sample weights; beyond, float32 sums of them lose rows, or overflow
_NO_TEXT = pa.scalar(None, pa.string())

Converted = tuple[pa.Array, np.ndarray]


@dataclasses.dataclass
class Notes:
    """Collects what the conversion of one column saw."""

    null_words: tuple[str, ...] = ()
    decimal: str = "."
    missing: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    """Words that were taken for missing values."""
    suspects: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    num_values: int = 0
    num_whole: int = 0
    """Text values that are whole numbers, such as 101."""
    num_point_zero: int = 0
    """Text values such as 101.0."""
    num_rounded: int = 0
    """Text values such as 1.23e+18, which lost digits in a float."""
    num_invisible: int = 0
    """Texts with letters that nobody sees, such as a zero-width space."""
    num_zoned: int = 0
    """Texts of times that name their zone."""
    num_local: int = 0
    """Texts of times that name none."""
    num_far_times: int = 0
    """Times before 1990 or after 2100 that no other unit explains."""

    def add(self, other: "Notes") -> None:
        """Adds what was seen of the same column in another file."""
        self.missing.update(other.missing)
        self.suspects.update(other.suspects)
        for field in dataclasses.fields(self):
            if field.type is int or field.type == "int":
                setattr(self, field.name, getattr(self, field.name) + int(getattr(other, field.name)))


@dataclasses.dataclass(frozen=True)
class Kind:
    """Says what a column should hold, and how it is read."""

    convert: typing.Callable[[pa.Array, Notes], Converted]
    type: pa.DataType
    expected: str
    """In words, such as "float64"."""
    fix: str = "correct the values or leave those rows out"
    is_list: bool = False
    unit: str = ""
    """Unit of a time."""
    column: str = ""
    """Name of the column in the file; "": that of the result."""

    def advice(self, given: str) -> str:
        """Says what to do about a bad value: for a time, the unit that fits."""
        other = unit_that_fits(given, self.unit) if self.unit else None
        if other:
            return f'{given} is a likely time with `time_unit = "{other}"`: correct `time_unit`, or the values'
        is_comma = self.type == pa.float64() and "," in given and given.replace(",", "", 1).lstrip("-").isdigit()
        return 'state `decimal = ","` in [csv], or correct the values' if is_comma else self.fix


def text(array: pa.Array, notes: Notes) -> Converted:
    """Spells a value in one way, whatever its type (`features.spelled`), and counts what kinds of text there are."""
    found, is_bad = features.spelled(array)
    if pa.types.is_floating(array.type) or pa.types.is_boolean(array.type):
        return found, is_bad
    if pa.types.is_integer(array.type):
        notes.num_whole += len(found) - found.null_count
    else:
        found = _without_words(found, notes)
        notes.num_whole += _mask(pc.match_substring_regex(found, r"^-?\d+$")).sum()
        notes.num_point_zero += _mask(pc.match_substring_regex(found, r"^-?\d+\.0+$")).sum()
        if not pc.all(pc.string_is_ascii(found)).as_py():
            notes.num_invisible += _mask(pc.match_substring_regex(found, _INVISIBLE)).sum()
        notes.num_rounded += _mask(pc.match_substring_regex(found, r"^-?\d(\.\d+)?[eE]\+?\d+$")).sum()
    notes.num_values += len(found) - found.null_count
    return found, is_bad


def _without_words(found: pa.Array, notes: Notes) -> pa.Array:
    """Replaces the words for missing values by null, and counts them and the suspect ones."""
    for words, counter in ((notes.null_words, notes.missing), (SUSPECT_WORDS, notes.suspects)):
        among = pc.is_in(found, pa.array([word for word in words if word], pa.string()))
        if _mask(among).any():
            for entry in pc.value_counts(found.filter(among)).to_pylist():
                counter[entry["values"]] += entry["counts"]
            if counter is notes.missing:
                found = pc.if_else(among, _NO_TEXT, found)
    return found


def number(array: pa.Array, notes: Notes) -> Converted:
    """Reads float64. NaN is missing; an infinite number is bad."""
    if pa.types.is_string(array.type):
        given, _ = text(array, notes)
        given = given if notes.decimal == "." else pc.replace_substring(given, notes.decimal, ".")
        found = _cast_where_possible(given, pa.float64())
        is_bad = _mask(given.is_valid()) & ~_mask(found.is_valid())
    else:
        found, is_bad = array.cast(pa.float64(), safe=False), _nowhere(array)  # a long integer is rounded
    is_nan = _mask(pc.is_nan(found))
    if is_nan.any():
        notes.missing["NaN"] += int(is_nan.sum())
        found = pc.if_else(pa.array(is_nan), pa.scalar(None, pa.float64()), found)
    return found, is_bad | _mask(pc.is_inf(found))


def whole_number(array: pa.Array, notes: Notes) -> Converted:
    """Reads int64: 1.0 is an integer to most tools that wrote such a file, 1.5 is not."""
    if pa.types.is_integer(array.type):
        found = array.cast(pa.int64(), safe=False)
        return found, _mask(pc.less(found, 0)) if array.type == pa.uint64() else _nowhere(array)
    given, found = array, pa.nulls(len(array), pa.int64())
    if pa.types.is_string(array.type):
        given = text(array, notes)[0]
        is_short = pc.match_substring_regex(given, r"^-?\d{1,18}$")
        found = pc.if_else(is_short, given, _NO_TEXT).cast(pa.int64())
    if found.null_count > given.null_count:  # 19 digits, or a point
        found = pc.coalesce(found, _cast_where_possible(given, pa.int64()))
        values = pc.fill_null(_cast_where_possible(given, pa.float64()), np.nan).to_numpy()
        is_whole = (np.floor(values) == values) & (np.abs(values) < 2.0**63)
        whole = pa.array(np.where(is_whole, values, 0).astype(np.int64), mask=~is_whole)
        found = pc.coalesce(found, whole)
    is_nan = _mask(pc.is_nan(array)) if pa.types.is_floating(array.type) else _nowhere(array)
    return found, _mask(given.is_valid()) & ~_mask(found.is_valid()) & ~is_nan


def label(array: pa.Array, notes: Notes) -> Converted:
    """Reads 0.0 or 1.0 from numbers, and from true and false."""
    if pa.types.is_boolean(array.type):
        return array.cast(pa.float64()), _nowhere(array)
    if pa.types.is_string(array.type):
        lower = pc.utf8_lower(pc.utf8_trim_whitespace(array))
        array = pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", array))
    found, is_bad = number(array, notes)
    is_label = _mask(pc.is_in(found, pa.array([0.0, 1.0])))
    return found, is_bad | (_mask(found.is_valid()) & ~is_label)


def weight(array: pa.Array, notes: Notes, at_most: float = MAX_WEIGHT) -> Converted:
    """Reads how often a row counts, or with `at_most` 1 a share above 0. A missing one is bad: 1 would be a guess."""
    found, is_bad = number(array, notes)
    values = pc.fill_null(found, np.nan).to_numpy()
    is_good = (values >= MIN_WEIGHT) & (values <= at_most) | (values == 0) & (at_most == MAX_WEIGHT)
    return found, is_bad | ~is_good


def bag(array: pa.Array, notes: Notes, separator: str = "") -> Converted:
    """Reads a list of texts: of a list column, of text parted by `separator`, or of JSON text where there is none."""
    is_bad = _nowhere(array)
    if pa.types.is_string(array.type):
        given, _ = text(array, Notes(notes.null_words))
        if separator:
            array = pc.split_pattern(given, separator)
        else:
            array = pa.array([_json_list(value) for value in given.to_pylist()], pa.list_(pa.string()))
            is_bad = _mask(given.is_valid()) & ~_mask(array.is_valid())
    rows = np.repeat(np.arange(len(array)), pc.fill_null(pc.list_value_length(array), 0).to_numpy())
    members, is_bad_member = text(features.plain(pc.list_flatten(array)), notes)
    is_bad[rows[is_bad_member]] = True
    is_there = _mask(members.is_valid())
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[is_there], minlength=len(array)))]).astype(np.int32)
    kept = members.filter(pa.array(is_there))
    return pa.ListArray.from_arrays(pa.array(offsets), kept, mask=pc.is_null(array)), is_bad


def _json_list(given: str | None) -> list[str | None] | None:
    try:
        values = json.loads(given) if given is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list):
        return None
    return [value if isinstance(value, str | None) else json.dumps(value) for value in values]


def time_us(array: pa.Array, notes: Notes, unit: str, zone: str) -> Converted:
    """Reads microseconds since 1970 (int64, later digits cut): numbers of `unit`, ISO text, or native time stamps.

    `zone`: of text and time stamps that name none.
    """
    if pa.types.is_temporal(array.type):
        moments = array.cast(pa.timestamp("us", getattr(array.type, "tz", None)), safe=False)
        found, is_bad = _in_zone(moments, zone).cast(pa.int64()), _nowhere(array)
    elif unit != "iso":
        return _epoch_us(array, notes, unit)
    else:
        given, _ = text(array, notes)
        found = _iso_us(given, zone)
        is_zoned = _mask(pc.match_substring_regex(given, _ZONED))
        notes.num_zoned += int(is_zoned.sum())
        notes.num_local += int((_mask(found.is_valid()) & ~is_zoned).sum())
        is_bad = _mask(given.is_valid()) & ~_mask(found.is_valid())
    is_late = _mask(pc.greater(found, LATEST_S * 1_000_000))
    notes.num_far_times += int((is_late | _mask(pc.less(found, EARLIEST_S * 1_000_000))).sum())
    return found, is_bad | _mask(pc.less(found, 0))


def _epoch_us(array: pa.Array, notes: Notes, unit: str) -> Converted:
    """Reads epoch times. One that is hardly a time, but would be one in another unit, is bad."""
    exact, is_bad = number(array, notes)
    whole, _ = whole_number(array, Notes(notes.null_words))
    values, per_second = pc.fill_null(exact, np.nan).to_numpy(), PER_SECOND[unit]
    seconds, known = values / per_second, ~np.isnan(values)
    is_wild = known & ~((seconds >= 0) & (seconds < END_OF_TIME_S))
    is_far = known & ~_is_likely(seconds)
    is_bad = is_bad | is_wild
    for other in PER_SECOND.values():
        is_bad = is_bad | (is_far & _is_likely(values / other))
    notes.num_far_times += int((is_far & ~is_bad).sum())
    is_whole = _mask(whole.is_valid()) & known & ~is_bad
    is_part = known & ~is_bad & ~is_whole
    found = np.zeros(len(array), np.int64)
    numbers = pc.fill_null(whole, 0).to_numpy()[is_whole]
    found[is_whole] = numbers * (1_000_000 // per_second) if per_second <= 1_000_000 else numbers // 1_000
    second = np.floor(seconds[is_part])
    part_us = np.minimum(np.floor((seconds[is_part] - second) * 1e6), 999_999)
    found[is_part] = second.astype(np.int64) * 1_000_000 + part_us.astype(np.int64)
    return pa.array(found, mask=~known), is_bad


def _is_likely(seconds: np.ndarray) -> np.ndarray:
    return (seconds >= EARLIEST_S) & (seconds <= LATEST_S)


def unit_that_fits(given: str, unit: str) -> str | None:
    """Names the unit of time that makes a likely time of a value that is none in `unit`; "iso" for a date."""
    try:
        value = float(given)
    except ValueError:
        return "iso" if _iso_us(pa.array([given]), "UTC")[0].is_valid else None
    fitting = [other for other, per_second in PER_SECOND.items() if _is_likely(np.array(value) / per_second)]
    return fitting[0] if fitting and fitting[0] != unit else None


def _iso_us(given: pa.Array, zone: str) -> pa.Array:
    """Parses ISO texts. The zone that a text names is obeyed; null for one that is not known."""
    parts = pc.extract_regex(given, _ISO)
    day, clock, fraction, named = (pc.struct_field(parts, name) for name in ("day", "clock", "fraction", "zone"))
    clock = pc.if_else(pc.equal(clock, ""), "00:00", clock)
    local = _cast_where_possible(pc.binary_join_element_wise(day, clock, " "), pa.timestamp("s"))
    local = local.cast(pa.timestamp("us"))
    micros = pc.utf8_slice_codeunits(pc.utf8_rpad(fraction, 6, "0"), 0, 6).cast(pa.int64())
    found = pa.nulls(len(given), pa.int64())
    for name in pc.unique(named).to_pylist():
        if name is not None:
            chosen = pc.if_else(pc.equal(named, name), local, pa.scalar(None, local.type))
            found = pc.coalesce(found, _utc_us(chosen, name or zone))
    return pc.add(found, micros)


def _utc_us(local: pa.Array, zone: str) -> pa.Array:
    """Converts clock times of a zone (a name, or an offset such as +02:00) to microseconds; null for no known zone."""
    if zone[0] in "+-":
        digits = zone[1:].replace(":", "").ljust(4, "0")
        minutes = int(digits[:2]) * 60 + int(digits[2:])
        return pc.subtract(local.cast(pa.int64()), (-minutes if zone[0] == "-" else minutes) * 60_000_000)
    try:
        return _in_zone(local, "UTC" if zone in ("Z", "z") else zone).cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        return pa.nulls(len(local), pa.int64())


def _in_zone(moments: pa.Array, zone: str) -> pa.Array:
    """Takes clock times as those of a zone: the first of two equal ones, and the next one where a clock skips it."""
    if moments.type.tz is not None:
        return moments
    return pc.assume_timezone(moments, zone, ambiguous="earliest", nonexistent="latest")


def _line(array: pa.Array, notes: Notes) -> Converted:
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(array), ""), _NO_TEXT, array), _nowhere(array)


def _place(array: pa.Array, notes: Notes) -> Converted:
    """Reads a number that orders events, as if it were seconds."""
    found, is_bad = whole_number(array, notes)
    is_bad = is_bad | _mask(pc.greater(found, 10**12)) | _mask(pc.less(found, 0))
    return pc.multiply(pc.if_else(pa.array(is_bad), pa.scalar(0, pa.int64()), found), 1_000_000), is_bad


KINDS = {
    "line": Kind(_line, pa.string(), "text"),
    "string": Kind(text, pa.string(), "text, or a number that a float holds exactly", "write long numbers as text"),
    "int64": Kind(whole_number, pa.int64(), "int64"),
    "place": Kind(_place, pa.int64(), "a whole number of at most 12 digits that orders events"),
    "float64": Kind(number, pa.float64(), "float64, a finite number"),
    "label": Kind(label, pa.float64(), "one of 0, 1, true, false, or nothing"),
    "weight": Kind(weight, pa.float64(), f"0, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, in every row"),
    "rate": Kind(
        functools.partial(weight, at_most=1.0),
        pa.float64(),
        f"a number above 0 (from {MIN_WEIGHT:g}), at most 1, in every row",
    ),
    "array<string>": Kind(
        bag,
        pa.list_(pa.string()),
        "array<string>: a list, or a list in JSON text",
        "state the `separator` of the bag, or correct the values",
        is_list=True,
    ),
}
"""The kinds of columns that need no more words."""


def bag_kind(separator: str) -> Kind:
    """Makes the kind of a bag in text, parted by the separator."""
    return Kind(functools.partial(bag, separator=separator), pa.list_(pa.string()), "text")


def time_kind(unit: str, zone: str) -> Kind:
    """Makes the kind of a time in a unit (s, ms, us, ns, iso), in microseconds since 1970."""
    words = "an ISO time such as 2024-05-01T13:30:00+02:00, with no zone but one of the tz database"
    if unit != "iso":
        words = f"an epoch time in {unit}"
    return Kind(
        functools.partial(time_us, unit=unit, zone=zone),
        pa.int64(),
        words,
        "correct `time_unit`, or the values",
        unit=unit,
    )


def _cast_where_possible(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Casts, with null where a value cannot be cast; halves the array around those."""
    try:
        return array.cast(kind)
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, kind)
    middle = len(array) // 2
    halves = [_cast_where_possible(part, kind) for part in (array[:middle], array[middle:])]
    return pa.concat_arrays(halves)


def _mask(flags: pa.Array) -> np.ndarray:
    """Returns the flags as booleans, false where there is no value."""
    return pc.fill_null(flags, False).to_numpy(zero_copy_only=False)


def _nowhere(array: pa.Array) -> np.ndarray:
    return np.zeros(len(array), bool)
