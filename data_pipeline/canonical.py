"""Defines what a source hands to the pipeline: a `Log` of Ibis tables, with feature specs, tasks and a split rule.

A source is a module in `data_pipeline/sources/` with

    def find_files(options: BuildOptions) -> dict[str, pathlib.Path]: ...
    def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> Log: ...

and, where it needs them,

    class Options: ...                                          # a dataclass; the source reads it as options.own
    DEFAULTS = {"max_history_length": 200}                      # other defaults of options of every source
    def complete(options: BuildOptions) -> BuildOptions: ...    # defaults that lie beside the raw files

`find_files` names every raw file that `read` will open (they are hashed for the no-op check and the manifest); it
raises ValueError for a missing one. `read` uses `raw_files.read_columns`, which checks columns and types, and counts
every raw row that it leaves out in `Log.skipped`.
"""

import dataclasses
import typing

import ibis
import ibis.expr.types as ir

from gpsd_dist import schema

ORIGINS = ("item_id", "items", "log", "users", "counts")
BEFORE_EVERYTHING_S = -(2**62)
EVENT_COLUMNS = {"user_id": "string", "item_id": "string", "time_s": "int64", "order": "int64"}


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Describes a feature of the model and the canonical column that it is made from (column name = feature name)."""

    name: str
    places: tuple[str, ...]
    origin: str
    """"item_id": the item itself. "items": a column of `Log.items`. "users": a column of `Log.users` (context only).
    "log": a column of the log row: of `events` for history, of `exposures` for candidate and context (the value at the
    first candidate of the request); where the log has no exposures, a context value is that of the target event.
    "counts": made by `counters`, for candidates."""
    kind: str = "categorical"
    table: str | None = None
    """Names the vocabulary; None means one of its own, named after the feature. Two features may share one."""
    is_bag: bool = False
    """The column is array<string>: several raw ids per item."""
    min_count: int | None = None
    """Raw ids with fewer occurrences in the training period become unknown; None means the option --min_count."""
    log: bool = False
    """The model sees the logarithm of the number, as `schema.Feature.log` says."""
    counts: str | None = None
    """Names the feature whose earlier events are counted."""
    window_s: int = 0
    prior_exposures: int = 0
    """Above 0: log-odds of labels of earlier days, as `schema.Feature.prior_exposures` says."""

    def __post_init__(self):
        if self.origin not in ORIGINS:
            raise ValueError(f"feature {self.name!r}: origin {self.origin!r} is not one of {ORIGINS}")
        if self.origin == "users" and self.places != ("context",):
            raise ValueError(f"feature {self.name!r}: a user column has the only place 'context', not {self.places!r}")
        if self.origin in ("item_id", "items") and "context" in self.places:
            raise ValueError(f"feature {self.name!r}: an item column occurs in history and candidate, not in context")
        if self.is_bag and self.origin != "items":
            raise ValueError(
                f"feature {self.name!r}: a bag must be an item attribute (origin 'items'), not {self.origin!r}"
            )
        self.feature()  # raises what the contract refuses

    @property
    def column(self) -> str:
        """Names the canonical column that holds the raw values."""
        return "item_id" if self.origin == "item_id" else self.name

    def feature(self) -> schema.Feature:
        """Describes the feature for the manifest."""
        table = (self.table or self.name) if self.kind == "categorical" else None
        made = schema.Feature(self.name, self.places, self.kind, table, self.is_bag, log=self.log, counts=self.counts)
        return dataclasses.replace(made, window_s=self.window_s, prior_exposures=self.prior_exposures)


@dataclasses.dataclass(frozen=True)
class TimeBoundaries:
    """Cuts labelled exposures by time: train < valid_from_s <= valid < test_from_s <= test < test_until_s (epoch s).

    Exposures at or after test_until_s are skipped in a plain build (and counted) and form the split `holdout` under
    `--split holdout`. Needs `Log.exposures` with a time in every row.
    """

    valid_from_s: int
    test_from_s: int
    test_until_s: int | None = None
    """None: no upper end, and no holdout."""
    pretrain_until_s: int | None = None
    """Pretraining rows hold the events before it and those without a time; None: before valid_from_s."""
    words: str = ""
    """Says the rule in words, for the manifest."""


@dataclasses.dataclass(frozen=True)
class LastItemByTime:
    """Makes one request per user (the GPSD protocol): target = last event, history = everything before it.

    Users up to the `train_quantile` of their last time train, later ones test; valid = the latest `valid_fraction` of
    the train users. Pretraining rows: everything but the last event, of all users.
    """

    train_quantile: float = 0.7
    valid_fraction: float = 0.15


@dataclasses.dataclass(frozen=True)
class LeaveLastOut:
    """Splits every user's sequence: test = last event, valid = second last, train = third last.

    Pretraining rows hold everything but the last two.

    Without valid, training goes on up to the test event: train = second last, pretraining = everything but the last. So
    HSTU and SASRec are trained for publication; what is chosen then is chosen on test.
    """

    has_valid: bool = True


@dataclasses.dataclass(frozen=True)
class Given:
    """Takes the split from a column of `Log.exposures` ("train" or "test"): one request per user, target = last event.

    valid = the latest `valid_fraction` of the train requests. Pretraining rows: everything but the last event, of all
    users.
    """

    valid_fraction: float = 0.15


SplitRule = TimeBoundaries | LastItemByTime | LeaveLastOut | Given


@dataclasses.dataclass(frozen=True)
class Log:
    """Holds the canonical tables of one source. Ids and categorical values are strings, null where unknown."""

    events: ir.Table
    """Becomes history: user_id, item_id (string), time_s (int64, null: before every timed event of the user),
    order (int64, breaks ties: a user's events are sorted by time_s with nulls first, then order, which must make them
    total), and the "log" features of history. Optional column latest_s (int64): an event without a time_s happened no
    later than this; it takes the place of time_s in sorting and in "strictly earlier than the request"."""
    items: ir.Table
    """item_id (string, unique) and the "items" features: string, array<string> for a bag, or float64."""
    features: tuple[FeatureSpec, ...]
    split: SplitRule
    order_words: str
    """Says in words how ties are ordered, for the manifest."""
    exposures: ir.Table | None = None
    """Becomes candidates: user_id, item_id, time_s (int64, never null), order, one column per task (0, 1 or null
    for not observed), and the "log" features of candidate and context. None: candidates are events plus drawn
    negatives."""
    users: ir.Table | None = None
    """user_id (string, unique) and the "users" features: string or float64."""
    tasks: tuple[schema.Task, ...] = (schema.Task("click"),)
    item_feature: str = "item"
    all_items_known: bool = False
    """Every row of `items` gets an index of the item vocabulary, even if it never occurs in the training period."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Counts the raw rows that `read` left out, by reason."""
    reading: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    """Records what was done to values beyond their type (`gpsd_dist.features.Rules`), so that serving does it too."""
    sampling: tuple[str, ...] = ()
    """Those of schema.SAMPLING that `exposures` has, as columns `sampling_weight` and `sampling_negative_rate`."""

    def specs_in(self, place: str) -> tuple[FeatureSpec, ...]:
        """Selects the specs of the features that occur in `place`, in manifest order."""
        return tuple(spec for spec in self.features if place in spec.places)


def checked(log: Log) -> Log:
    """Returns the log; ValueError if a table lacks a column that the specs and tasks need, or has another type."""
    needed = {"events": dict(EVENT_COLUMNS), "items": {"item_id": "string"}}
    needed["exposures"] = dict(EVENT_COLUMNS) | {task.name: "float64" for task in log.tasks}
    needed["exposures"] |= {f"sampling_{name}": "float64" for name in log.sampling}
    needed["users"] = {"user_id": "string"}
    for spec in log.features:
        kind = "float64" if spec.kind == "numerical" else "array<string>" if spec.is_bag else "string"
        for table in _tables_of(spec, log.exposures is not None):
            needed[table][spec.name] = kind
    if isinstance(log.split, Given):
        needed["exposures"]["split"] = "string"
    if isinstance(log.split, (TimeBoundaries, Given)) and log.exposures is None:
        raise ValueError(f"the split rule {type(log.split).__name__} needs a log with exposures, this one has none")
    for name, columns in needed.items():
        table = getattr(log, name)
        if table is None:
            if name == "users" and any(spec.origin == "users" for spec in log.features):
                raise ValueError("there are features with origin 'users', but the log has no users table")
            continue
        _check_columns(name, table, columns)
    return log


def without_valid(rule: SplitRule) -> SplitRule:
    """Returns the rule with training, and pretraining, right up to the test period: `valid` is empty."""
    if isinstance(rule, TimeBoundaries):
        words = f"{rule.words}; no valid: its period belongs to train" if rule.words else ""
        return dataclasses.replace(rule, valid_from_s=rule.test_from_s, words=words)
    if isinstance(rule, LeaveLastOut):
        return LeaveLastOut(has_valid=False)
    return dataclasses.replace(rule, valid_fraction=0.0)


def known_time_s(events: ir.Table) -> ir.IntegerValue:
    """Returns the time that sorts an event: time_s, else latest_s, else before everything."""
    bounds = [events["latest_s"]] if "latest_s" in events.columns else []
    return ibis.coalesce(events["time_s"], *bounds, ibis.literal(BEFORE_EVERYTHING_S))


def _tables_of(spec: FeatureSpec, has_exposures: bool) -> set[str]:
    if spec.origin == "item_id":
        return set()
    if spec.origin != "log":
        return {spec.origin}
    tables = {"events"} if "history" in spec.places else set()
    if "candidate" in spec.places and not has_exposures:
        raise ValueError(f"feature {spec.name!r}: drawn negatives have no value for a log column of candidates")
    if {"candidate", "context"} & set(spec.places):
        tables.add("exposures" if has_exposures else "events")
    return tables


def _check_columns(name: str, table: ir.Table, columns: dict[str, str]) -> None:
    found = table.schema()
    for column, kind in columns.items():
        if column not in found:
            raise ValueError(f"table {name!r} has no column {column!r}; it has {list(found)}")
        if found[column] != ibis.dtype(kind):
            raise ValueError(
                f"table {name!r}, column {column!r}: found {found[column]}, expected {kind}; cast it in the source"
            )
