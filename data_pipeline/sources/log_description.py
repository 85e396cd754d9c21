"""The TOML file of the `generic` source: which file holds what, as frozen dataclasses. Opens no log.

Every key is a field of a dataclass below; an unknown key, a missing one or a wrong type is a ValueError that names the
file and the key. `data_pipeline/sources/README.md` explains the keys with examples.
"""

import dataclasses
import difflib
import pathlib
import tomllib
import types
import typing

from data_pipeline.sources import log_rules
from gpsd_dist import schema

SECTIONS = log_rules.SECTIONS


@dataclasses.dataclass(frozen=True)
class FeatureColumn:
    """One input column: `[[<section>.feature]]`."""

    column: str
    name: str = ""
    """Name in the prepared data; default: the column."""
    kind: str = "categorical"
    """"categorical", "numerical" or "bag" (several values per row)."""
    separator: str = ""
    """Of a bag in a string column; a list column needs none."""
    place: str = ""
    """Only in [exposure]: "candidate" (a value per row) or "context" (that of the first row with a history)."""

    @property
    def label(self) -> str:
        """Name in the prepared data."""
        return self.name or self.column


@dataclasses.dataclass(frozen=True)
class TaskColumn:
    """One label column of the exposure log: `[[exposure.task]]`."""

    column: str
    name: str = ""
    given: str = ""
    """Name of the task that must be 1 for this one to count."""

    @property
    def label(self) -> str:
        """Name of the task."""
        return self.name or self.column


@dataclasses.dataclass(frozen=True)
class HistoryLog:
    """`[history]`: the log of what users did; it becomes histories and pretraining sequences."""

    files: str
    user: str
    item: str
    time: str
    time_unit: str = "s"
    event: str = ""
    """Column with the type of the event."""
    event_types: tuple[str, ...] = ()
    """Types that count; empty = all. Rows of other types are counted as skipped."""
    feature: tuple[FeatureColumn, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExposureLog:
    """`[exposure]`: what was shown, and what came of it. Without it, candidates are last events and drawn negatives."""

    files: str
    user: str
    item: str
    time: str
    task: tuple[TaskColumn, ...]
    time_unit: str = "s"
    request: str = ""
    """Column shared by the rows that were shown together: they get the earliest time of any of them."""
    extends_history: str = ""
    """Name of the task whose label 1 makes the exposure an event of later histories."""
    feature: tuple[FeatureColumn, ...] = ()


@dataclasses.dataclass(frozen=True)
class ItemsFile:
    """`[items]`: attributes of items."""

    item: str = ""
    files: str = ""
    """Empty: the attributes are columns of the history log; the latest value counts."""
    feature: tuple[FeatureColumn, ...] = ()


@dataclasses.dataclass(frozen=True)
class UsersFile:
    """`[users]`: attributes of users; they become context features."""

    files: str
    user: str
    feature: tuple[FeatureColumn, ...]


@dataclasses.dataclass(frozen=True)
class CsvStyle:
    """`[csv]`: how every CSV file of the description is written."""

    separator: str = ","
    header: bool = True
    columns: tuple[str, ...] = ()
    """Names in order, where there is no header."""


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """`[split]`: how train, valid and test are cut."""

    rule: str = ""
    """Default: "time" with an exposure log, "last_item_by_time" without."""
    time_zone: str = "UTC"
    """Of ISO times and dates without an offset, and of the boundaries."""
    valid_from: str = ""
    """Date or ISO time; give `valid_from` and `test_from`, or neither."""
    test_from: str = ""
    test_until: str = ""
    """Later exposures are left out and counted, or form the split `holdout` under --split holdout."""
    valid_fraction: float = 0.1
    """Of the exposures in time order, where no dates are given; of the train users under last_item_by_time."""
    test_fraction: float = 0.1
    """Of the exposures; of the users (those with the latest last event) under last_item_by_time."""


@dataclasses.dataclass(frozen=True)
class Options:
    """`[options]`: what the prepared data keep. The command line goes first."""

    max_history_length: int = 50
    min_count: int = 1
    num_negatives: int = 1
    """Per target, where there is no exposure log."""
    negatives: str = "uniform"
    hashed_features: str = ""
    """"NAME:ROWS,...": features without a vocabulary, see docs/ids.md."""
    managed_features: str = ""


@dataclasses.dataclass(frozen=True)
class LogDescription:
    """The whole file."""

    history: HistoryLog | None = None
    exposure: ExposureLog | None = None
    items: ItemsFile | None = None
    users: UsersFile | None = None
    csv: CsvStyle = CsvStyle()
    split: SplitRule = SplitRule()
    options: Options = Options()

    def tasks(self) -> tuple[schema.Task, ...]:
        """Tasks of the exposure log; without one, drawn negatives make a click task."""
        if self.exposure is None:
            return (schema.Task("click"),)
        return tuple(schema.Task(task.label, task.given or None) for task in self.exposure.task)


def read(path: str | pathlib.Path) -> LogDescription:
    """Reads and checks the TOML file; raises one ValueError with every problem found."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --schema names a TOML file, see data_pipeline/sources/README.md")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    problems: list[str] = []
    description = _build(LogDescription, raw, "", problems)
    if not problems:
        problems = log_rules.problems_of(description)
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return description


def _build(cls: type, raw: dict, where: str, problems: list[str]) -> typing.Any:
    """An instance of `cls` from a TOML table; appends to `problems` and returns None if a key does not fit."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    found = len(problems)
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            problems.append(f"unknown key {_join(where, key)!r}; {hint}")
    values = {}
    hints = typing.get_type_hints(cls)
    for key, field in fields.items():
        if key in raw:
            values[key] = _value(hints[key], raw[key], _join(where, key), problems)
        elif field.default is dataclasses.MISSING:
            problems.append(f"key {_join(where, key)!r} is missing")
    return cls(**values) if len(problems) == found else None


def _value(hint: typing.Any, raw: typing.Any, where: str, problems: list[str]) -> typing.Any:
    """`raw` as the annotated type: a scalar, a tuple of scalars or of dataclasses, or a dataclass."""
    if isinstance(hint, types.UnionType):  # X | None: TOML has no null, so X
        hint = typing.get_args(hint)[0]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(raw, dict):
            return _build(hint, raw, where, problems)
        problems.append(f"{where!r} is {raw!r}, expected a table [{where}]")
        return None
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        if isinstance(raw, list):
            return tuple(_value(element, entry, f"{where}[{number}]", problems) for number, entry in enumerate(raw))
        problems.append(
            f"{where!r} is {raw!r}, expected a list" + (f" of tables [[{where}]]" if element is not str else "")
        )
        return None
    if hint is float and type(raw) is int:
        return float(raw)
    if hint is str and not isinstance(raw, str) and hasattr(raw, "isoformat"):  # a TOML date or date-time
        return raw.isoformat()
    if type(raw) is not hint:
        kind = (
            "a list"
            if typing.get_origin(hint) is tuple
            else f"a table [{where}]"
            if dataclasses.is_dataclass(hint)
            else hint.__name__
        )
        problems.append(f"{where!r} is {raw!r}, expected {kind}")
    return raw


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
