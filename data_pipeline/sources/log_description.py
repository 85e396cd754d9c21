"""Reads the TOML file of the `generic` source, which says what file holds what. Opens no log.

Every key is a field of a dataclass below, with its type, its known values and its bounds; pydantic checks them. Rules
between keys and sections are the functions at the end. An unknown key, a missing one or a wrong value is a ValueError
that names the file and the key. `data_pipeline/sources/README.md` explains the keys with examples.
"""

import datetime
import json
import pathlib
import tomllib
import types
import typing
import zoneinfo

import pydantic
import pydantic.dataclasses

from data_pipeline import explain, raw_values
from data_pipeline.options import Count, Negatives, Vocabulary
from gpsd_dist import schema

SECTIONS = ("history", "exposure", "items", "users")
TimeUnit = typing.Literal["s", "ms", "us", "ns", "iso"]
MAX_ACTIONS = 8  # sections of `described_files.SECTIONS`, one of which is [history]
MAX_NAME_BYTES = 100  # a vocabulary's file is named after its feature
RESERVED_NAMES = (
    # These are columns of the pipeline itself,
    *("item", "item_id", "user_id", "time_s", "order", "position", "split", "num_before", "num_events", "rank"),
    *("known_s", "sequence", "shuffle_key", "request_time_s", "history_length", "user_hash", "time_us", "latest_s"),
    *("bucket", "block", "file_order", "sampling_weight", "sampling_negative_rate"),
    # of vocabularies, of items.parquet, and of the choice of the latest attributes.
    *("count", "index", "place"),
)


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class FeatureColumn:
    """Describes one input column: `[[<section>.feature]]`."""

    column: str
    name: str = ""
    """Name in the prepared data; default: the column."""
    kind: typing.Literal["categorical", "numerical", "bag"] = "categorical"
    """A bag has several values per row."""
    separator: str = ""
    """Parts a bag in a string column; a list column needs none."""
    clip_quantile: float = 0.0
    """Cuts a number off at its lowest and highest values: 0.001 moves the 0.1 % at each end to the next one."""
    log: bool = False
    """A model sees the logarithm of the number, sign(x) log(1 + |x|): for prices and counts."""
    place: str = ""
    """Only in [exposure]: "candidate" (a value per row) or "context" (that of the first row with a history)."""

    @property
    def label(self) -> str:
        """Names the feature in the prepared data."""
        return self.name or self.column


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class TaskColumn:
    """Describes one label column of the exposure log: `[[exposure.task]]`."""

    column: str
    name: str = ""
    given: str = ""
    """Name of the task that must be 1 for this one to count."""

    @property
    def label(self) -> str:
        """Names the task."""
        return self.name or self.column


def _as_tuple(given: typing.Any) -> typing.Any:
    """Takes one name for a list of one."""
    return ((given,) if given else ()) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class HistoryLog:
    """Describes the log of what users did, `[history]`; it becomes histories and pretraining sequences."""

    files: str
    user: str
    item: str
    time: str = ""
    time_unit: TimeUnit = "s"
    order_only: bool = False
    """`time` is any whole number that orders a user's events, or missing: then the order of the rows counts."""
    event: str = ""
    """Column with the type of the event."""
    event_types: tuple[str, ...] = ()
    """Types that count; empty = all. Rows of other types are counted as skipped."""
    feature: tuple[FeatureColumn, ...] = ()
    partition_columns: tuple[str, ...] = ()
    """Columns that are names of folders: country=FR/part-0.parquet."""
    keep_copies: bool = False
    """Rows that are equal in every column read count as often as they are there, not once."""


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class ExposureLog:
    """Describes what was shown, and what came of it, `[exposure]`.

    Without it, candidates are last events and drawn negatives.
    """

    files: str
    user: str
    item: str
    time: str
    task: tuple[TaskColumn, ...]
    time_unit: TimeUnit = "s"
    request: str = ""
    """Column shared by the rows that were shown together: they get the earliest time of any of them."""
    extends_history: typing.Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_tuple)] = ()
    """Names of the tasks whose label 1 makes the exposure an event of later histories, one for each such label."""
    action: str = ""
    """History feature that says which of these tasks made the event; default with several: "action"."""
    feature: tuple[FeatureColumn, ...] = ()
    partition_columns: tuple[str, ...] = ()
    keep_copies: bool = False
    weight: str = ""
    """Column that says how often a row counts in the losses."""
    negative_sampling_rate: float | str = ""
    """Share of the negatives that the log kept: a number, or a column that has it for positives too."""

    @property
    def history_action(self) -> str:
        """Names the history feature of actions, "" where there is none."""
        return self.action or ("action" if len(self.extends_history) > 1 else "")


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class ItemsFile:
    """Describes the attributes of items, `[items]`."""

    item: str = ""
    files: str = ""
    """Empty: the attributes are columns of the history log; the latest value counts."""
    feature: tuple[FeatureColumn, ...] = ()
    partition_columns: tuple[str, ...] = ()


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class UsersFile:
    """Describes the attributes of users, `[users]`; they become context features."""

    files: str
    user: str
    feature: tuple[FeatureColumn, ...]
    partition_columns: tuple[str, ...] = ()


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class CsvStyle:
    """Says how every CSV file of the description is written, `[csv]`."""

    separator: str = ","
    header: bool = True
    columns: tuple[str, ...] = ()
    """Names in order, where there is no header."""
    quote: str | None = None
    """Default: a double quote; quotes that seem to join rows are refused until it is stated. "": no quotes."""
    escape: str = ""
    """Letter before a quote inside of quotes, as Spark, Hive and MySQL write; default: such a quote is doubled."""
    null_words: tuple[str, ...] = raw_values.MISSING_WORDS
    """Texts that stand for a missing value, in files of every kind."""
    decimal: typing.Literal[".", ","] = "."


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class SplitRule:
    """Says how train, valid and test are cut, `[split]`."""

    rule: typing.Literal["", "time", "last_item_by_time", "leave_last_out"] = ""
    """Default: "time" with an exposure log, "last_item_by_time" without."""
    no_valid: bool = False
    """Train right up to the test period or event."""
    time_zone: str = "UTC"
    """Zone of ISO times and dates without an offset, and of the boundaries."""
    valid_from: str = ""
    """Date or ISO time; give `valid_from` and `test_from`, or neither."""
    test_from: str = ""
    test_until: str = ""
    """Later exposures are left out and counted, or form the split `holdout` under --split holdout."""
    valid_fraction: float = 0.1
    """Share of the exposures in time order, where no dates are given; of the train users under last_item_by_time."""
    test_fraction: float = 0.1
    """Share of the exposures; of the users (those with the latest last event) under last_item_by_time."""


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class Options:
    """Holds what the prepared data keep, `[options]`. The command line goes first."""

    max_history_length: Count = 50
    min_count: Count = 1
    num_negatives: Count = 1
    """Drawn per target, where there is no exposure log."""
    negatives: Negatives = "uniform"
    vocabulary: Vocabulary = "training"
    """all_items: every item of [items] gets an index, whether or not it occurs in the training period."""
    hashed_features: str = ""
    """"NAME:ROWS,...": features without a vocabulary, docs/ids.md."""
    managed_features: str = ""


@pydantic.dataclasses.dataclass(frozen=True, config=explain.STRICT)
class LogDescription:
    """Describes a whole log; a section that the file lacks is None or has its defaults."""

    history: HistoryLog | None = None
    exposure: ExposureLog | None = None
    items: ItemsFile | None = None
    users: UsersFile | None = None
    csv: CsvStyle = CsvStyle()
    split: SplitRule = SplitRule()
    options: Options = Options()

    def tasks(self) -> tuple[schema.Task, ...]:
        """Returns the tasks of the exposure log; without one, drawn negatives make a click task."""
        if self.exposure is None:
            return (schema.Task("click"),)
        return tuple(schema.Task(task.label, task.given or None) for task in self.exposure.task)

    def sampling(self) -> dict[str, str | float]:
        """Returns those of schema.SAMPLING that the exposures have: name -> column, or the value of all rows."""
        given = ("", "") if self.exposure is None else (self.exposure.weight, self.exposure.negative_sampling_rate)
        return {name: value for name, value in zip(schema.SAMPLING, given, strict=True) if value != ""}


def read(path: str | pathlib.Path) -> LogDescription:
    """Reads and checks the TOML file; raises one ValueError with every problem found."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --schema names a TOML file, see data_pipeline/sources/README.md")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    try:
        # Through JSON, which has lists for tuples and text for dates and times, as the strict fields need them.
        text = json.dumps(raw, default=lambda moment: moment.isoformat())
        description = pydantic.TypeAdapter(LogDescription).validate_json(text)
    except pydantic.ValidationError as error:
        problems = [_in_words(problem) for problem in explain.problems(error)]
    else:
        problems = _rules(description)
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return description


def _in_words(problem: explain.Problem) -> str:
    if problem.is_unknown:
        return f"unknown key {problem.key!r}; {explain.did_you_mean(str(problem.path[-1]), _keys_beside(problem.path))}"
    if problem.is_missing:
        return f"key {problem.key!r} is missing"
    expected = f"{problem.expected} [{problem.key}]" if problem.expected == "a table" else problem.expected
    if problem.key in ("split.valid_from", "split.test_from", "split.test_until"):
        expected = "a date or an ISO time, such as 2024-05-01 or 2024-05-01T12:00:00"
        if isinstance(problem.given, int) and 0 < problem.given < raw_values.END_OF_TIME_S:
            moment = datetime.datetime.fromtimestamp(problem.given, datetime.UTC)
            expected += f"; as epoch seconds that would be {moment:%Y-%m-%dT%H:%M:%S}+00:00: write this"
    return f"{problem.key!r} is {problem.given!r}, expected {expected}"


def _keys_beside(path: tuple[str | int, ...]) -> list[str]:
    """Lists the keys of the table that the last part of `path` lies in."""
    found: typing.Any = LogDescription
    for part in path[:-1]:
        if isinstance(part, str):
            found = typing.get_type_hints(found)[part]
        if isinstance(found, types.UnionType) or typing.get_origin(found) is tuple:  # X | None, or tuple[X, ...]
            found = typing.get_args(found)[0]
    return list(typing.get_type_hints(found))


def _rules(d: LogDescription) -> list[str]:
    """Lists what is wrong between keys and between sections, each of which is right by itself."""
    problems = []
    if d.history is None and d.exposure is None:
        problems.append("there is neither [history] nor [exposure]: describe at least one log")
    if d.history is None and d.exposure is not None and not d.exposure.extends_history:
        problems.append("without [history], exposure.extends_history must name the task whose 1 makes a history event")
    for section in SECTIONS:
        part = getattr(d, section)
        for number, feature in enumerate(() if part is None else part.feature):
            problems += _check_feature(section, f"{section}.feature[{number}]", feature)
    problems += _check_names(d) + _check_exposure(d) + _check_split(d.split)
    if d.exposure is None and d.split.rule == "time":
        problems.append(
            "'split.rule' is 'time', which cuts [exposure]; without it use 'last_item_by_time' or 'leave_last_out'"
        )
    if d.history is not None and not d.history.time and not d.history.order_only:
        problems.append("'history.time' is missing; without times state `order_only = true`")
    if d.history is not None and d.history.order_only and (d.exposure is not None or d.split.rule != "leave_last_out"):
        problems.append("'history.order_only' needs `rule = \"leave_last_out\"` in [split], and no [exposure]")
    if d.items is not None and bool(d.items.files) != bool(d.items.item):
        problems.append(
            "[items] needs both `files` and `item`, or neither (attributes in the columns of the history log)"
        )
    if d.items is not None and not d.items.files and d.history is None:
        problems.append("[items] without `files` takes the attributes from the history log, and there is no [history]")
    if d.csv.header == bool(d.csv.columns):
        problems.append("[csv] needs `columns` exactly where `header = false`")
    for key, lengths in (("separator", (1, 2)), ("quote", (0, 1)), ("escape", (0, 1))):
        value = getattr(d.csv, key)
        if value is not None and len(value.encode()) not in lengths:
            problems.append(f"'csv.{key}' is {value!r}, expected {lengths[0]} or {lengths[1]} plain letters")
    return problems


def _check_feature(section: str, where: str, feature: FeatureColumn) -> list[str]:
    problems = []
    if feature.separator and feature.kind != "bag":
        problems.append(f"'{where}.separator' is set, but kind is {feature.kind!r}; only a bag has one")
    if feature.clip_quantile and (feature.kind != "numerical" or not 0 < feature.clip_quantile < 0.5):
        given = feature.clip_quantile
        problems.append(f"'{where}.clip_quantile' is {given}, expected a number in (0, 0.5), of kind 'numerical'")
    if feature.log and feature.kind != "numerical":
        problems.append(f"'{where}.log' is set, but kind is {feature.kind!r}; only a number has a logarithm")
    if feature.kind == "bag" and section != "items":
        problems.append(f"'{where}.kind' is 'bag'; only [[items.feature]] can be one")
    if section == "exposure" and feature.place not in ("candidate", "context"):
        problems.append(f"'{where}.place' is {feature.place!r}, expected 'candidate' or 'context'")
    if section != "exposure" and feature.place:
        problems.append(f"'{where}.place' is only for [[exposure.feature]]")
    return problems


def _check_names(d: LogDescription) -> list[str]:
    parts = [getattr(d, section) for section in SECTIONS]
    names = [feature.label for part in parts if part is not None for feature in part.feature]
    names += [task.name for task in d.tasks()] if d.exposure is not None else []
    action = "" if d.exposure is None else d.exposure.history_action
    if action and action not in [feature.label for feature in (d.history.feature if d.history else ())]:
        names.append(action)
    lower = [name.casefold() for name in names]  # engines do not tell Cat from cat
    twice = sorted({name for name in names if lower.count(name.casefold()) > 1})
    problems = []
    if twice:
        problems.append(
            f"the names {twice} are the same, or differ in case only; give all but one of them another `name`"
        )
    taken = sorted(
        {
            name
            for name in names
            if name.casefold() in RESERVED_NAMES
            or not name.isidentifier()
            or name.startswith("_")
            or len(name.encode()) > MAX_NAME_BYTES
        }
    )
    rule = f"letters, digits and inner underscores, at most {MAX_NAME_BYTES} bytes, and in any case none of "
    rule += ", ".join(RESERVED_NAMES)
    shown = [name if len(name) <= MAX_NAME_BYTES else f"{name[:40]}..." for name in taken]
    return problems + [f"the name {name!r} cannot be used; give it a `name` of {rule}" for name in shown]


def _check_exposure(d: LogDescription) -> list[str]:
    if d.exposure is None:
        return []
    problems = []
    names = [task.label for task in d.exposure.task]
    if not names:
        problems.append("[exposure] has no [[exposure.task]]: name at least one label column")
    for task in d.exposure.task:
        if task.given and (task.given not in names or task.given == task.label):
            problems.append(f"task {task.label!r} is given {task.given!r}; other tasks: {names}")
    extending = d.exposure.extends_history
    if not set(extending) <= set(names) or len(set(extending)) < len(extending) or len(extending) >= MAX_ACTIONS:
        problems.append(
            f"'exposure.extends_history' is {list(extending)}, expected one of the tasks {names}, or several"
        )
    if d.exposure.action and not extending:
        problems.append("'exposure.action' says which task made an event; name the tasks in `extends_history`")
    rate = d.exposure.negative_sampling_rate
    if not isinstance(rate, str) and not raw_values.MIN_WEIGHT <= rate <= 1:
        expected = f"expected above 0 (from {raw_values.MIN_WEIGHT:g}), at most 1, or a column"
        problems.append(f"'exposure.negative_sampling_rate' is {rate}, {expected}")
    unconditional = [task.label for task in d.exposure.task if not task.given]
    if rate != "" and len(unconditional) > 1:
        problems.append(
            f"'exposure.negative_sampling_rate' corrects one task and those that are `given` it, and {unconditional} "
            "are given none; state `given`, or a `weight` column of 1 / rate for the sampled rows, 1 for others"
        )
    if d.split.rule not in ("", "time"):
        problems.append(f"'split.rule' is {d.split.rule!r}: with an [exposure] log the splits are cut by 'time'")
    return problems


def _check_split(split: SplitRule) -> list[str]:
    problems = []
    if split.time_zone not in zoneinfo.available_timezones():
        problems.append(f"'split.time_zone' is {split.time_zone!r}, expected a name like 'UTC' or 'Asia/Shanghai'")
    if bool(split.valid_from) != bool(split.test_from):
        problems.append("[split] has only one of `valid_from` and `test_from`; give both, or fractions")
    low, high = split.valid_fraction, split.test_fraction
    for key in ("valid_from", "test_from", "test_until"):
        try:
            datetime.datetime.fromisoformat(getattr(split, key) or "2000-01-01")
        except ValueError:
            problems.append(f"'split.{key}' is {getattr(split, key)!r}, expected a date or an ISO time")
    if split.test_until and not split.test_from:
        problems.append("[split] has `test_until` without `test_from`")
    if not (0 < low < 1 and 0 < high < 1 and low + high < 1):
        problems.append(f"[split] fractions {low} and {high} must lie in (0, 1) and sum to less than 1")
    return problems
