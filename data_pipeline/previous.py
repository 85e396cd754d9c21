"""Reads the data set that `--append_to` and `--split holdout` add rows to, and checks that new rows may join it."""

import dataclasses
import pathlib
import reprlib

import ibis.expr.types as ir
import pydantic

from data_pipeline import canonical, engine, explain, fingerprint, vocab
from data_pipeline.options import BuildOptions
from gpsd_dist import features, schema
from gpsd_dist.data import data_versions

MAX_LATE_SHARE = 0.01  # 192 of 91,989 exposures (0.2 %) of KuaiRand's files of May are of Apr 30 by time_ms
LATE = "exposures that came late: before the end of the data set's test period, and not in it"


@dataclasses.dataclass(frozen=True)
class Previous:
    """Holds a data set that an earlier build wrote."""

    folder: pathlib.Path
    manifest: schema.Manifest
    manifest_sha256: str


def read(folder: pathlib.Path, options: BuildOptions) -> Previous:
    """Reads the data set in `folder`. ValueError if it is of another source, or if no later log is named."""
    folder = data_versions.current(folder) if folder.resolve() == options.out_dir else data_versions.opened(folder)
    manifest = schema.read_manifest(folder)
    if options.raw_dir is None:
        raise ValueError("--raw_dir is missing; it is the folder with the later log")
    if manifest.source != options.source:
        raise ValueError(f"{folder} was built with --source {manifest.source}, not {options.source}; use that source")
    return Previous(folder, manifest, fingerprint.file_sha256(folder / schema.MANIFEST_NAME))


def as_built(options: BuildOptions, previous: Previous) -> BuildOptions:
    """Returns the recorded options of the previous build: later rows cannot be cut or encoded in another way.

    ValueError for a typed option that had another value then, and for a manifest whose options cannot be.
    """
    found, path = previous.manifest.options, previous.folder / schema.MANIFEST_NAME
    built_from = found.get("raw_dir")
    if not isinstance(built_from, str | None):
        given = reprlib.repr(built_from)
        raise ValueError(f"{path}: options.raw_dir is {given}, expected a folder's name; build the data set again")
    if built_from is None or not pathlib.Path(built_from).is_dir():
        built_from = options.raw_dir  # then raw_dir must hold everything, and find_files says what it lacks
    # `split_rule` of a manifest is the name of the rule's class, not the option of that name that some sources have.
    known = {name: found[name] for name in options.recorded() if name in found and name != "split_rule"}
    if "schema" in options.given:  # the description that is given now counts
        known.pop("schema", None)
    elif isinstance(known.get("schema"), str):
        known["schema"] = pathlib.Path(known["schema"])  # the manifest has it as text
    try:
        settled = dataclasses.replace(
            options.settled(known), built_from_dir=pathlib.Path(built_from), reading=_reading(previous)
        )
    except pydantic.ValidationError as error:
        wrong = [f"options.{w.key} is {reprlib.repr(w.given)}, expected {w.expected}" for w in explain.problems(error)]
        raise ValueError(f"{path}: {'; '.join(wrong)}; build the data set again") from error
    then, now = settled.recorded(), options.recorded()
    other = [f"--{n} {now[n]} (then: {then[n]})" for n in sorted(options.given & set(known)) if then[n] != now[n]]
    if other:
        raise ValueError(f"{previous.folder} was built with other options: {', '.join(other)}; leave them out")
    return settled


def check_same_contract(log: canonical.Log, previous: Previous) -> None:
    """Raises ValueError unless the log has features and tasks of the previous data set, and values are read alike."""
    written = previous.manifest.features
    unmeasured = tuple(
        dataclasses.replace(feature, mean=0.0, std=1.0, low=None, high=None, quantiles=()) for feature in written
    )
    then = unmeasured, previous.manifest.tasks, previous.manifest.sampling
    if (tuple(spec.feature() for spec in log.features), log.tasks, log.sampling) != then:
        raise ValueError(
            f"{previous.folder} was built with other features, tasks or weights than this version has; build it again"
        )
    then_read, now_read = _reading(previous), features.Rules.of_options(log.reading)
    if then_read is None:
        return
    lost = then_read.whole - now_read.whole
    if lost:
        raise ValueError(
            f"{previous.folder} spells the ids of {sorted(lost)} without a .0 at their end, as all were whole numbers; "
            "some are not now, so old ids would be unknown: correct the new rows, or build again"
        )
    for name in ("null_words", "clip"):
        then, now = getattr(then_read, name), getattr(now_read, name)
        if then != now:
            raise ValueError(
                f"{previous.folder} was built with {name} {reprlib.repr(then)}, and the schema now says "
                f"{reprlib.repr(now)}: old and new rows would differ; take the old one, or build again"
            )


def _reading(previous: Previous) -> features.Rules | None:
    """Returns how the values of the previous data set were read; None if it does not say, being older."""
    given = previous.manifest.options.get("reading")
    return None if given is None else features.Rules.of_options(given)


def exposures_around(log: canonical.Log, until_s: int) -> tuple[int, int]:
    """Counts the exposures before that moment, and those at or after it."""
    is_later = log.exposures.time_s >= until_s
    found = log.exposures.agg(later=is_later.sum().fill_null(0), num=log.exposures.count()).execute().iloc[0]
    return int(found["num"]) - int(found["later"]), int(found["later"])


def count_late_exposures(log: canonical.Log, previous: Previous, until_s: int) -> dict[str, int]:
    """Counts the exposures before `until_s` that the previous data set was not made of, as a reason for skipped rows.

    A file that is cut by its own `date` ends with some rows of another day. They are no requests of any split, and
    their events are in later histories. ValueError if the log lacks old exposures, or has more than a few late ones.
    """
    expected = sum(previous.manifest.split(name).num_candidates for name in ("train", "valid", "test"))
    num_old, num_later = exposures_around(log, until_s)
    num_late = num_old - expected
    known = previous.manifest.skipped.get(LATE, 0)
    if not 0 <= num_late <= known + MAX_LATE_SHARE * num_later:
        raise ValueError(
            f"the log holds {num_old:,} exposures before {until_s} (epoch s), but {previous.folder} was made of "
            f"{expected:,} (up to {MAX_LATE_SHARE:.0%} of the {num_later:,} later ones may come late); histories need "
            "the whole log, its old part unchanged: complete --raw_dir, or build again"
        )
    return {LATE: num_late} if num_late else {}


def read_vocabulary(running: engine.Engine, table: schema.Table, previous: Previous) -> ir.Table:
    """Opens a written vocabulary. ValueError if it is not the one that the manifest describes."""
    path = previous.folder / "vocab" / f"{table.name}.parquet"
    words = vocab.read(running, table.name, path)
    if vocab.measure(path) != (table.num_rows, table.fingerprint):
        raise ValueError(f"{path} is not the vocabulary that the manifest describes; build the data set again")
    return words
