"""Defines the data contract that `data_pipeline` writes and `gpsd_dist` reads: Parquet columns and `manifest.json`.

    out_dir/versions/<name>/            one version; `data_versions` finds it
      manifest.json                     this file's `Manifest`
      pretrain/part-00000.parquet       history columns only
      train/ valid/ test/ [holdout/]    history + candidate + label + context columns
      vocab/<table>.parquet             raw_id (string), index (int64), count (int64, in the training period)
      items.parquet                     index of the item table + every item attribute that is a feature
      counters/                         events, items and rates.parquet: what serving counts by; with --counts, --rates

One row is one user request: a history (oldest event first) and K >= 1 candidates that were shown with it.
This module needs pyarrow only, neither torch nor ibis.
"""

import dataclasses
import json
import pathlib
import reprlib
import types
import typing

import pyarrow as pa

from gpsd_dist.disk.reading import again
from gpsd_dist.disk.writing import write_json

SCHEMA_VERSION = 1
PADDING_INDEX = 0
UNKNOWN_INDEX = 1
NUM_RESERVED_ROWS = 2  # index 0 is padding, 1 is unknown; the first known id has index 2
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**28  # untuned: 100,000 files take some 10 MB
MAX_NESTING = 32
MAX_ROWS = 2**48  # bounds a table and a split, so that sums and products of counts stay inside int64
MAX_HISTORY_LENGTH = 2**24  # untuned; the column is int32
PLACES = ("history", "candidate", "context")
KINDS = ("categorical", "numerical")
ID_KINDS = ("hashed", "managed")
SAMPLING = ("weight", "negative_rate")
"""Columns of candidates that are no features: how much a row counts, and the share of negatives that the log kept."""
ID_BITS = 60  # width of ids in tables without a vocabulary, taken from the md5 of the raw id
MAX_ID = (1 << ID_BITS) - 1 + NUM_RESERVED_ROWS
_MAX_WINDOW_S = 2**40  # 35,000 years: a time minus a window stays far inside int64
_MAX_SHOWN = 10  # problems in one message
_FLOAT32_MAX = 3.4e38
T = typing.TypeVar("T")
Named = typing.TypeVar("Named", "Feature", "Table", "Split")


@dataclasses.dataclass(frozen=True)
class Feature:
    """Describes one input of the model, in one or more places of a row."""

    name: str
    places: tuple[str, ...]
    """Any of "history", "candidate", "context". A feature of history and candidate is a token feature."""
    kind: str = "categorical"
    table: str | None = None  # Embedding table that its indices point into; None for a numerical feature
    is_bag: bool = False
    """Several indices per token (tags of a video): the column has one more list level. Categorical only."""
    mean: float = 0.0  # Mean over the training split, for a numerical feature; the model sees (value - mean) / std
    std: float = 1.0  # Standard deviation over the training split, above 0
    low: float | None = None
    high: float | None = None
    """The model sees a number cut off at these bounds; None: there is none. `mean` and `std` are of cut-off numbers."""
    log: bool = False
    """The model sees sign(x) log(1 + |x|) of a number; `mean`, `std`, `low` and `high` are of that."""
    quantiles: tuple[float, ...] = ()
    """Distinct inner quantiles of a number over the training split, ascending: the edges of its buckets."""
    counts: str | None = None
    """The number counts earlier events with the value that the candidate has of this other feature."""
    window_s: int = 0
    """How far back a count goes; 0: to the beginning."""
    prior_exposures: int = 0
    """Above 0: the number is no count but the log-odds of the first task's label, over the exposures of the whole days
    before the request with that value of `counts`, smoothed by so many exposures at the overall rate of these days."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"feature {self.name!r}: kind {self.kind!r} is not one of {KINDS}")
        if not self.places or any(place not in PLACES for place in self.places):
            raise ValueError(f"feature {self.name!r}: places {self.places!r} must be a non-empty part of {PLACES}")
        if (self.kind == "categorical") != (self.table is not None):
            raise ValueError(f"feature {self.name!r} is {self.kind}, but its table is {self.table!r}")
        if not (abs(self.mean) < _FLOAT32_MAX and 1 / _FLOAT32_MAX < self.std < _FLOAT32_MAX):
            raise ValueError(f"feature {self.name!r}: mean {self.mean} and std {self.std} must be finite, std above 0")
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if any(not abs(bound) < _FLOAT32_MAX for bound in bounds) or bounds != sorted(bounds):
            raise ValueError(f"feature {self.name!r}: low {self.low} and high {self.high} must be finite, and ascend")
        if any(not abs(q) < _FLOAT32_MAX for q in self.quantiles) or list(self.quantiles) != sorted(self.quantiles):
            raise ValueError(f"feature {self.name!r}: quantiles {self.quantiles} must be finite, and ascend")
        is_bounded = 0 <= self.window_s < _MAX_WINDOW_S and 0 <= self.prior_exposures <= MAX_ROWS * bool(self.counts)
        if not is_bounded or ((self.counts or self.log or self.quantiles) and self.kind != "numerical"):
            raise ValueError(
                f"feature {self.name!r}: only a number counts, has a log, quantiles, and a window of 0 s to 2^40 s; "
                "one that counts may have prior_exposures of 0 to 2^48"
            )
        if self.is_bag and self.kind != "categorical":
            raise ValueError(f"feature {self.name!r}: only a categorical feature can be a bag")

    def arrow_type(self, place: str) -> pa.DataType:
        """Returns the Arrow type of the column `<place>.<name>`."""
        scalar = pa.int64() if self.kind == "categorical" else pa.float32()
        value = pa.list_(scalar) if self.is_bag else scalar
        return value if place == "context" else pa.list_(value)


@dataclasses.dataclass(frozen=True)
class Table:
    """Describes one embedding table: size, and identity of its vocabulary."""

    name: str
    num_rows: int  # Rows of the embedding table: known ids + the two reserved ones. Without a vocabulary: a default.
    fingerprint: str
    """Hash over all (raw id, index) pairs; tables are interchangeable only if it agrees. See unbounded_fingerprint."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Describes one label column."""

    name: str
    given: str | None = None
    """A conditional task is trained and scored only where this other label is 1 (conversion given click)."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Holds counts and bounds of one folder of Parquet files."""

    name: str
    files: tuple[str, ...]  # Paths relative to the manifest, in reading order
    num_rows: int
    num_history_tokens: int
    num_candidates: int
    time_from_s: int | None  # Smallest request time in the split (epoch seconds); None for `pretrain`
    time_to_s: int | None  # Largest request time in the split


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes a data set to the trainer; it is the only source of table sizes."""

    source: str
    features: tuple[Feature, ...]
    tables: tuple[Table, ...]
    tasks: tuple[Task, ...]
    splits: tuple[Split, ...]
    max_history_length: int
    item_feature: str = "item"  # The feature that is predicted in pretraining; it occurs in history and candidate
    split_rule: str = ""  # How the splits were cut, in words and numbers
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # Raw rows that were not used, by reason
    sources: tuple[dict[str, typing.Any], ...] = ()  # Raw files: {"path", "bytes", "sha256"}
    options: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    """Options of the build. "chain": steps of `--append_to`, each with the tables of the data set before it."""
    command: str = ""
    schema_version: int = SCHEMA_VERSION
    unbounded: dict[str, str] = dataclasses.field(default_factory=dict)
    """Table -> "hashed" or "managed": its columns hold 64-bit ids (2 ... MAX_ID, 1 where the log has none) instead of
    row numbers, and the trainer finds the rows (docs/ids.md). Other tables have a vocabulary in `vocab/`."""
    sampling: tuple[str, ...] = ()
    """Those of SAMPLING that the data set has: columns `sampling.weight` and `sampling.negative_rate`."""

    def feature(self, name: str) -> Feature:
        """Finds a feature by name; ValueError lists the known ones."""
        return _named(self.features, name, "feature")

    def table(self, name: str) -> Table:
        """Finds a table by name; ValueError lists the known ones."""
        return _named(self.tables, name, "table")

    def value_limit(self, table: str) -> int:
        """Returns the exclusive upper bound of values in the table's columns: its rows, or MAX_ID + 1 for ids."""
        return MAX_ID + 1 if table in self.unbounded else self.table(table).num_rows

    def split(self, name: str) -> Split:
        """Finds a split by name, or joins several ("train+valid"); ValueError lists the known ones."""
        parts = [_named(self.splits, part, "split") for part in name.split("+")]
        if len(set(parts)) < len(parts) or (len(parts) > 1 and "pretrain" in name.split("+")):
            raise ValueError(f"splits {name!r}: they must differ, and `pretrain` has other columns than the others")
        return parts[0] if len(parts) == 1 else _joined(name, parts)

    def features_in(self, place: str) -> tuple[Feature, ...]:
        """Lists the features that occur in `place`, in manifest order."""
        return tuple(feature for feature in self.features if place in feature.places)


def _joined(name: str, parts: list[Split]) -> Split:
    return Split(
        name,
        files=tuple(file for part in parts for file in part.files),
        num_rows=sum(part.num_rows for part in parts),
        num_history_tokens=sum(part.num_history_tokens for part in parts),
        num_candidates=sum(part.num_candidates for part in parts),
        time_from_s=min((part.time_from_s for part in parts if part.time_from_s is not None), default=None),
        time_to_s=max((part.time_to_s for part in parts if part.time_to_s is not None), default=None),
    )


def _named(entries: tuple[Named, ...], name: str, what: str) -> Named:
    for entry in entries:
        if entry.name == name:
            return entry
    raise ValueError(f"the data set has no {what} {name!r}; it has {[entry.name for entry in entries]}")


def unbounded_fingerprint(kind: str, num_rows: int) -> str:
    """Returns the fingerprint of a table without a vocabulary.

    The 1 in it is the version of `data_pipeline.hashing.id_of` and of the rules of docs/ids.md. Raise it with any
    change after which an id finds another row.
    """
    return f"{kind}-1-{num_rows}"


def arrow_schema(manifest: Manifest, split: str) -> pa.Schema:
    """Builds the schema of one split's files. `pretrain` has no candidates, labels, context or request time."""
    fields = [
        pa.field("user_id", pa.string()),
        pa.field("user_hash", pa.int64()),
        pa.field("history_length", pa.int32()),
    ]
    fields += [pa.field(f"history.{f.name}", f.arrow_type("history")) for f in manifest.features_in("history")]
    fields += [pa.field("history.time_s", pa.list_(pa.int64()))]  # null element: the log does not say when
    if split == "pretrain":
        return pa.schema(fields)
    fields += [pa.field("request_time_s", pa.int64())]
    for place in ("candidate", "context"):
        fields += [pa.field(f"{place}.{f.name}", f.arrow_type(place)) for f in manifest.features_in(place)]
    fields += [pa.field(f"label.{task.name}", pa.list_(pa.float32())) for task in manifest.tasks]  # null: not observed
    fields += [pa.field(f"sampling.{name}", pa.list_(pa.float32())) for name in manifest.sampling]
    return pa.schema(fields)


def write_manifest(manifest: Manifest, out_dir: pathlib.Path) -> None:
    """Writes `manifest.json` by rename, so that a reader never sees half of it."""
    write_json(pathlib.Path(out_dir) / MANIFEST_NAME, dataclasses.asdict(manifest))


def read_manifest(data_dir: str | pathlib.Path) -> Manifest:
    """Reads and checks `manifest.json`; every problem is a ValueError that names the file and what to do."""
    path = pathlib.Path(data_dir) / MANIFEST_NAME
    if not path.is_file():
        if (path.parent / "versions").is_dir():
            raise ValueError(f"{data_dir} has versions of a data set, read that of data_versions.opened({data_dir})")
        raise ValueError(
            f"{path} does not exist; prepare the data first: python -m data_pipeline.build --out_dir {data_dir} ..."
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path} has more than {MAX_MANIFEST_BYTES:,} bytes, which no manifest has")
    try:
        raw = json.loads(again(path, lambda: path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # Python also raises ValueError for an integer of too many digits.
        raise ValueError(f"{path} is not valid JSON ({error}); build the data set again") from error
    try:
        return manifest_from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; build the data set again") from error


def nests_deeper(value: typing.Any, levels: int) -> bool:
    """Says whether lists, tuples and dicts in `value` (a tree) stand in each other more than `levels` deep."""
    layer = [value]
    for _ in range(levels):
        containers = [entry for entry in layer if isinstance(entry, dict | list | tuple)]
        layer = [part for entry in containers for part in (entry.values() if isinstance(entry, dict) else entry)]
    return any(isinstance(entry, dict | list | tuple) for entry in layer)


def manifest_from_dict(raw: typing.Any) -> Manifest:
    """Builds a manifest from the JSON of `dataclasses.asdict(manifest)`. ValueError says what does not fit."""
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        found = raw.get("schema_version") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"it has schema version {found!r}, this code reads {SCHEMA_VERSION}")
    if nests_deeper(raw, MAX_NESTING):
        raise ValueError(f"its values nest more than {MAX_NESTING} deep")
    parts = {"features": Feature, "tables": Table, "tasks": Task, "splits": Split}
    try:
        made = {key: tuple(_from_dict(cls, entry) for entry in raw[key]) for key, cls in parts.items()}
        lists = {key: tuple(raw.get(key, ())) for key in ("sources", "sampling")}
        manifest = _typed(Manifest(**raw | made | lists))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"it does not fit the schema: {type(error).__name__}: {error}") from error
    _check(manifest)
    return manifest


def _from_dict(cls: type, entry: dict[str, typing.Any]) -> typing.Any:
    return _typed(cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}))


def _typed(made: T) -> T:
    """Returns the object; TypeError if the value of a field does not have the annotated type."""
    for name, hint in typing.get_type_hints(type(made)).items():
        if not _is_instance(getattr(made, name), hint):
            expected = getattr(hint, "__name__", hint)
            found = reprlib.repr(getattr(made, name))
            raise TypeError(f"{type(made).__name__}.{name} is {found}, expected {expected}")
    return made


def _is_instance(value: typing.Any, hint: typing.Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_instance(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_instance(entry, arguments[1]) for entry in value.values())
    if origin is types.UnionType:
        return any(_is_instance(value, argument) for argument in arguments)
    kind = (int, float) if hint is float else hint
    return isinstance(value, kind) and not (hint in (int, float) and isinstance(value, bool))


def _check(manifest: Manifest) -> None:
    """Checks cross references and paths inside the manifest; raises one ValueError with all problems."""
    problems = []
    for what in ("features", "tables", "tasks", "splits"):
        names = [entry.name for entry in getattr(manifest, what)]
        if len(set(names)) < len(names):
            problems.append(f"names of {what} must differ, they are {names}")
    tables = {table.name: table for table in manifest.tables}
    for feature in manifest.features:
        if feature.table is not None and feature.table not in tables:
            problems.append(f"feature {feature.name!r} points into table {feature.table!r}, which is not listed")
    for table in manifest.tables:
        if not NUM_RESERVED_ROWS <= table.num_rows <= MAX_ROWS:
            expected = f"expected at least {NUM_RESERVED_ROWS}, at most {MAX_ROWS}"
            problems.append(f"table {table.name!r} has num_rows {table.num_rows}, {expected}")
    for name, kind in manifest.unbounded.items():
        if name not in tables or kind not in ID_KINDS:
            problems.append(f"unbounded: {name!r} is {kind!r}, expected a table of the list and one of {ID_KINDS}")
        elif tables[name].num_rows <= NUM_RESERVED_ROWS:
            problems.append(f"table {name!r} has {tables[name].num_rows} rows, none of them for an id")
    names = [task.name for task in manifest.tasks]
    for task in manifest.tasks:
        if task.given is not None and task.given not in names:
            problems.append(f"task {task.name!r} is given {task.given!r}, which is not a task")
    if not set(manifest.sampling) <= set(SAMPLING) or len(set(manifest.sampling)) < len(manifest.sampling):
        problems.append(f"sampling is {manifest.sampling}, expected some of {SAMPLING}, each once")
    item = [feature for feature in manifest.features if feature.name == manifest.item_feature]
    if not item or not {"history", "candidate"} <= set(item[0].places):
        problems.append(f"item feature {manifest.item_feature!r} must occur in history and candidate")
    if not 1 <= manifest.max_history_length <= MAX_HISTORY_LENGTH:
        problems.append(f"max_history_length {manifest.max_history_length} is not in 1 .. {MAX_HISTORY_LENGTH}")
    named = {feature.name for feature in manifest.features_in("candidate")}
    for feature in manifest.features:
        if feature.counts is not None and (feature.counts not in named or feature.places != ("candidate",)):
            problems.append(f"feature {feature.name!r} counts {feature.counts!r}: both must be features of candidates")
    problems += [problem for split in manifest.splits for problem in _problems_of(split, manifest.max_history_length)]
    chain = manifest.options.get("chain", [])
    for step in chain if isinstance(chain, list) else [chain]:
        if not _is_step(step):
            expected = "expected steps {'tables': [{'name', 'num_rows', 'fingerprint'}, ...], ...}"
            problems.append(f"options.chain, what the data set grew from, holds {reprlib.repr(step)}, {expected}")
    if problems:
        raise ValueError("; ".join(problems[:_MAX_SHOWN]))


def _is_step(step: typing.Any) -> bool:
    try:
        return isinstance(step["tables"], list) and all(_from_dict(Table, entry) for entry in step["tables"])
    except (TypeError, KeyError, AttributeError):
        return False


def _problems_of(split: Split, max_history_length: int) -> list[str]:
    """Finds impossible counts, paths that lead out of the data folder, files listed twice."""
    problems = []
    for name in ("num_rows", "num_history_tokens", "num_candidates"):
        if not 0 <= getattr(split, name) <= MAX_ROWS:
            problems.append(f"split {split.name!r} has {name} {getattr(split, name)}, expected 0 .. {MAX_ROWS}")
    if split.num_history_tokens > split.num_rows * max_history_length:
        problems.append(
            f"split {split.name!r} has {split.num_history_tokens} history tokens in {split.num_rows} rows of at most "
            f"{max_history_length}"
        )
    if len(set(split.files)) < len(split.files):
        problems.append(f"split {split.name!r} lists a file twice")
    for file in split.files:
        path = pathlib.PurePath(file)
        if path.is_absolute() or ".." in path.parts or not file.isprintable() or not path.parts:
            problems.append(f"split {split.name!r} names {file[:200]!r}, which is no file in the data folder")
    return problems
