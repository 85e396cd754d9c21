"""Defines the options of a build as one frozen dataclass: a field is an option of the command line.

Its metadata hold the help text and whether the option is recorded: whether it decides what is written, so that it
belongs to the fingerprint and to the manifest. Where the log lies and how it is worked on (engine, memory, buckets)
leave the rows alone, and are not recorded. A source keeps its own options in a dataclass of its module, made of
`option` too; all of them are recorded.
"""

import argparse
import dataclasses
import pathlib
import re
import types
import typing

import pydantic
import pydantic.dataclasses

from data_pipeline import explain

Split = typing.Literal["all", "holdout"]
Negatives = typing.Literal["uniform", "popularity"]
Vocabulary = typing.Literal["training", "all_items"]
Compression = typing.Literal["zstd", "lz4", "snappy", "none"]
EngineName = typing.Literal["duckdb", "spark"]
_NO_VOCABULARY = "these features get no vocabulary but 64-bit ids; the table has ROWS rows unless a run says otherwise"
TOTAL = "total"
Count = typing.Annotated[int, pydantic.Field(ge=1)]


def option(
    default: typing.Any = dataclasses.MISSING,
    help: str | None = None,
    *,
    is_recorded: bool = True,
    is_flag: bool = True,
    metavar: str | None = None,
) -> typing.Any:
    """Makes a field that is an option of the command line; `is_flag` False: a field that only code sets."""
    return dataclasses.field(
        default=default,
        metadata={"help": help, "is_recorded": is_recorded, "is_flag": is_flag, "metavar": metavar},
    )


def _check_fraction(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("between 0 and 1")
    return value


def windows(text: str) -> dict[str, int]:
    """Reads "7d,30d,total" as window -> seconds, 0 for "total". ValueError says what is expected."""
    names = [name for name in text.split(",") if text]
    found = {name: 0 if name == TOTAL else _window_s(name) for name in names}
    if len(found) < len(names) or any(size_s is None for size_s in found.values()):
        raise ValueError(f"windows such as 7d,30d,{TOTAL}, each once")
    return typing.cast(dict[str, int], found)


def _window_s(name: str) -> int | None:
    parts = re.fullmatch(r"([1-9]\d{0,4})([hdw])", name)
    return None if parts is None else int(parts[1]) * {"h": 3600, "d": 86_400, "w": 604_800}[parts[2]]


def _check_counts(text: str) -> str:
    windows(text)
    return text


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=explain.STRICT)
class BuildOptions:
    """Holds everything that a build is told. `command_line.parse` makes it from a command."""

    source: str = option(is_recorded=False)
    raw_dir: pathlib.Path | None = option(None, "folder with the raw files", is_recorded=False)
    out_dir: pathlib.Path = option(help="folder of the data set", is_recorded=False)
    split: Split = option("all", "holdout: add a later day to a built data set", is_recorded=False)
    append_to: pathlib.Path | None = option(
        None, "a built data set: add the next day of its log to it, into --out_dir", is_recorded=False
    )
    # At least 2, because a pretraining row needs two events: one to read and one to predict.
    max_history_length: typing.Annotated[int, pydantic.Field(ge=2)] = option(50, "most recent events kept per row")
    min_count: Count = option(1, "ids with fewer training occurrences become unknown")
    vocabulary: Vocabulary = option("training", "all_items: every item of the items file has an index, seen or not")
    no_valid: bool = option(False, "train right up to the test period or event; nothing chooses a checkpoint then")
    valid_fraction: typing.Annotated[float, pydantic.AfterValidator(_check_fraction)] = option(
        0.15, "part of the train users, where a rule carves valid out"
    )
    num_negatives: Count = option(1, "drawn per positive, where the log has no labels")
    negatives: Negatives = option("uniform")
    hashed_features: str = option("", _NO_VOCABULARY, metavar="NAME:ROWS,...")
    managed_features: str = option("", _NO_VOCABULARY, metavar="NAME:ROWS,...")
    counts: typing.Annotated[str, pydantic.AfterValidator(_check_counts)] = option(
        "",
        "candidates get the number of earlier events of their item, and of each of its attributes, in these windows "
        "before the request; w, d and h are weeks, days and hours",
        metavar="7d,30d,total",
    )
    user_counts: bool = option(
        False,
        "with --counts, also the user's own events, up to the midnight (UTC) before the request: up to the second they "
        "order a user's day against its labels (docs/results.md, section 2)",
    )
    rates: typing.Annotated[int, pydantic.Field(ge=0)] = option(
        0,
        "candidates get the log-odds of their item's first label on the whole days (UTC) before the request, smoothed "
        "by that many exposures, such as 20, at the overall rate of these days; 0: none",
        metavar="EXPOSURES",
    )
    daily_requests: bool = option(
        False, "end every request at midnight (UTC), as `gpsd_dist.fit --daily` needs it: it trains up to a day"
    )
    seed: int = option(0, "of the drawn negatives")
    compression: Compression = option("zstd")
    row_group_rows: Count = option(4096, "small groups shuffle better, large ones read faster")
    file_rows: Count = option(1 << 20, "rows per part file")
    engine: EngineName = option("duckdb", is_recorded=False)
    memory_limit: str = option("4GB", "of the engine; beyond it, it spills to disk beside --out_dir", is_recorded=False)
    threads: int | None = option(None, "of --engine duckdb; default: all cores", is_recorded=False)
    spark_master: str | None = option(None, "of --engine spark, such as yarn or local[*] (default)", is_recorded=False)
    spark_conf: tuple[str, ...] = option((), "a Spark setting; may be repeated", is_recorded=False, metavar="KEY=VALUE")
    num_buckets: typing.Annotated[int, pydantic.Field(ge=0, le=4096)] = option(
        0, "of users, worked on one after the other; 0: by the number of events", is_recorded=False
    )
    force: bool = option(False, "build even if nothing changed", is_recorded=False)
    keep_versions: Count = option(
        2, "newest versions that stay in --out_dir; one that is being read stays too", is_recorded=False
    )
    allow_empty: bool = option(
        False, "build even if a split, its labels or its histories are empty, or if no id joins", is_recorded=False
    )
    own: typing.Any = option(None, is_recorded=False, is_flag=False)
    """Holds the source's own options: an instance of its module's `Options`, or None where it has none."""
    given: frozenset[str] = option(frozenset(), is_recorded=False, is_flag=False)
    """Names that were typed, or that an earlier build settled: a source does not replace these by its defaults."""
    built_from_dir: pathlib.Path | None = option(None, is_recorded=False, is_flag=False)
    """Where an earlier build found its raw files, when rows are added to its data set."""

    reading: typing.Any = option(None, is_recorded=False, is_flag=False)
    """How an earlier build read values (`canonical.Log.reading`), when rows are added to its data set."""

    @property
    def mode(self) -> str:
        """Names what is made: "build" a new data set, "append" the next day to one, or add a "holdout" split to one."""
        return "append" if self.append_to is not None else "build" if self.split == "all" else "holdout"

    def recorded(self) -> dict[str, typing.Any]:
        """Returns the options that decide what is written, the source's own ones last."""
        common = [field.name for field in dataclasses.fields(self) if field.metadata["is_recorded"]]
        own = [] if self.own is None else [field.name for field in dataclasses.fields(self.own)]
        return {name: getattr(self, name) for name in common} | {name: getattr(self.own, name) for name in own}

    def settled(self, values: dict[str, typing.Any]) -> "BuildOptions":
        """Returns these options with `values` of some recorded ones, which no default of a source replaces any more.

        pydantic.ValidationError for a value that cannot be.
        """
        own = {name: value for name, value in values.items() if name not in _COMMON}
        return dataclasses.replace(
            self,
            **{name: value for name, value in values.items() if name in _COMMON},
            own=dataclasses.replace(self.own, **own) if own else self.own,
            given=self.given.union(values),
        )

    def with_defaults(self, defaults: dict[str, typing.Any]) -> "BuildOptions":
        """Returns these options with a source's defaults of common ones, except where a value was given."""
        return dataclasses.replace(self, **{k: v for k, v in defaults.items() if k not in self.given})


_COMMON = frozenset(field.name for field in dataclasses.fields(BuildOptions))


def add_arguments(parser: argparse.ArgumentParser, cls: type, **choices: typing.Sequence[str]) -> None:
    """Adds one argument per field of `cls`, without a default: only what is typed reaches the namespace.

    `choices`: the values of fields whose type does not list them.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata["is_flag"]:
            about = {key: field.metadata[key] for key in ("help", "metavar") if field.metadata[key] is not None}
            is_required = field.default is dataclasses.MISSING
            kind = {"choices": choices[field.name]} if field.name in choices else _conversion(hints[field.name])
            parser.add_argument(f"--{field.name}", **kind, **about, required=is_required)


def _conversion(hint: typing.Any) -> dict[str, typing.Any]:
    """Finds the arguments of `add_argument` that turn words into a value of that type."""
    if isinstance(hint, types.UnionType):  # X | None: an option that was not typed stays None
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    return {"action": "append"} if typing.get_origin(hint) is tuple else {"type": hint}


def make(source: str, own_class: type | None, defaults: dict, typed: dict[str, typing.Any]) -> BuildOptions:
    """Checks what was typed and completes it; one ValueError names every value that cannot be."""
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    wrong, own = [], None
    try:
        if own_class is not None:
            own = own_class(**{name: value for name, value in typed.items() if name not in _COMMON})
    except pydantic.ValidationError as error:
        wrong += explain.problems(error)
    common = {name: value for name, value in typed.items() if name in _COMMON}
    try:
        options = BuildOptions(**(defaults | common), own=own, given=frozenset(typed))
    except pydantic.ValidationError as error:
        wrong = explain.problems(error) + wrong
    messages = [
        f"--{w.key} {w.given} must {'lie' if w.expected.startswith('between') else 'be'} {w.expected}" for w in wrong
    ]
    if typed.get("append_to") is not None and typed.get("split", "all") != "all":
        messages.append("--append_to adds the later day as `test`; leave --split out")
    if messages:
        raise ValueError("; ".join(messages))
    return options
