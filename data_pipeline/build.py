"""Builds a data set: raw files -> Parquet and manifest.json.

python -m data_pipeline.build --source amazon_grocery --raw_dir RAW --out_dir OUT
python -m data_pipeline.build --source kuairand_pure --raw_dir RAW_WITH_A_LATER_DAY --out_dir OUT --split holdout
python -m data_pipeline.build --source generic --raw_dir RAW --append_to DAY1 --out_dir DAY2
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m data_pipeline.build ...")

from gpsd_dist.cli.missing import require

if __name__ == "__main__":
    require("ibis", "duckdb")

import contextlib
import dataclasses
import pathlib
import shlex
import signal
import threading
import time
import typing

from data_pipeline import (
    append,
    canonical,
    command_line,
    counters,
    engine,
    fingerprint,
    fresh,
    holdout,
    previous,
    progress,
    publish,
    sequences,
    shares,
    sources,
    validate,
    vocab,
    write,
)
from data_pipeline.options import BuildOptions
from data_pipeline.plan import Job, Plan
from gpsd_dist import schema
from gpsd_dist.cli.main import run_main
from gpsd_dist.data import data_versions
from gpsd_dist.disk.text import shown

FINISHED, FAILED, MISTAKE, NO_FILE_ACCESS, STOPPED, INTERRUPTED = 0, 1, 2, 74, 75, 130
WARNINGS = "warnings"
"""Option of the manifest: what was printed as a warning."""
OBSERVED = "observed_labels"
"""Option of the manifest: task -> observed labels in train, which training looks at."""
MODES = {"build": fresh, "append": append, "holdout": holdout}
_asked_to_stop = threading.Event()


class Stopped(BaseException):
    """SIGTERM asked the build to stop."""


def _refuse_if_stopped() -> None:
    if _asked_to_stop.is_set():
        raise Stopped


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (those of a training run), with one line for what went wrong."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _stopping():
            build(command_line.parse(argv, __doc__), "python -m data_pipeline.build " + shlex.join(argv))
    except ValueError as error:
        return _ended(str(error), MISTAKE)
    except OSError as error:
        return _ended(f"a file could not be read or written: {error}", NO_FILE_ACCESS)
    except MemoryError as error:
        return _ended(
            f"out of memory ({error or 'Python'}); see --memory_limit, --num_buckets and --row_group_rows", FAILED
        )
    except engine.EngineFailed as error:
        return _ended(str(error), NO_FILE_ACCESS if "No space left" in str(error) else FAILED)
    except Stopped:
        return _ended("stopped by SIGTERM; no data set was changed", STOPPED)
    except KeyboardInterrupt:
        return _ended("stopped by Ctrl-C; no data set was changed", INTERRUPTED)
    return FINISHED


def _ended(message: str, status: int) -> int:
    print(f"error: {shown(message)}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _stopping() -> typing.Iterator[None]:
    """Turns SIGTERM into `Stopped`, so that what is half done is removed as for every other error."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(number: int, frame: typing.Any) -> None:
        _asked_to_stop.set()
        raise Stopped  # Python drops it if the signal comes while an object is being deleted.

    _asked_to_stop.clear()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build(options: BuildOptions, command: str) -> None:
    """Plans a data set (or what is added to one), writes it, checks it and makes it the current version of `out_dir`.

    ValueError for every problem of the input, OSError for files that cannot be written.
    """
    # What a link points to gets the version, and is locked, whatever it is called.
    options = dataclasses.replace(options, out_dir=options.out_dir.resolve())
    with progress.warnings() as warnings, publish.locked(options.out_dir):
        started = time.monotonic()
        if _build(options, command, warnings):
            folder = data_versions.current(options.out_dir)
            report(schema.read_manifest(folder))
            for warning in warnings:
                progress.say(f"  warning: {warning}")
            progress.say(f"done in {time.monotonic() - started:.1f} s: {folder / schema.MANIFEST_NAME}")


def _build(options: BuildOptions, command: str, warnings: list[str]) -> bool:
    """Does the work of `build`; returns False if there was nothing to do."""
    source, mode = sources.load(options.source), MODES[options.mode]
    # Everything that can be refused without opening the log comes first. The fingerprint is over raw files, options and
    # this package's code: an equal one means that there is nothing to do.
    found = mode.find_previous(options)
    options = sources.complete(source, options if found is None else previous.as_built(options, found))
    files = source.find_files(options)
    prints = fingerprint.describe(files, mode.fingerprinted(options), options.source)
    if not options.force and mode.is_current(options, found, prints["fingerprint"]):
        progress.say(f"{options.out_dir} is up to date: same raw files, options and pipeline code; nothing to do")
        return False
    progress.say(f"{options.mode} {options.source}: {options.raw_dir} -> {options.out_dir}")
    # All is written aside and published at the end, so that a build that fails changes nothing.
    with publish.version(options.out_dir, options.keep_versions, _refuse_if_stopped) as aside:
        with engine.scratch(options, aside, sum(path.stat().st_size for path in files.values())) as running:
            log = canonical.checked(source.read(running, files, options))
            split = canonical.without_valid(log.split) if options.no_valid else log.split
            log = dataclasses.replace(log, split=split, all_items_known=options.vocabulary == "all_items")
            log = counters.described(log, options)
            prints["sources"] = fingerprint.with_rows(prints["sources"], running.rows_of)
            plan = mode.plan(running, log, Job(options, found, prints, command))
            if found is not None:
                publish.link(plan.linked_files, found.folder, aside)
            manifest = _write(running, plan, aside, options)
        written = [name for name in plan.splits if not (name == "valid" and options.no_valid)]
        observed = shares.check(aside, manifest, written=written, is_allowed=options.allow_empty)
        if mode.ONLY is None:
            more = {WARNINGS: list(warnings)} | ({OBSERVED: observed} if observed else {})
            manifest = dataclasses.replace(manifest, options=manifest.options | more)
        schema.write_manifest(manifest, aside)
        validate.check(aside, mode.ONLY)  # reads the files again: what was written counts, not what was meant
    return True


def _write(running: engine.Engine, plan: Plan, aside: pathlib.Path, options: BuildOptions) -> schema.Manifest:
    """Writes vocabularies, splits and items; returns the manifest of all."""
    # Vocabularies come before rows, because rows hold their indices; a table without one holds 64-bit ids.
    tables = vocab.write_all(running, plan.vocabularies, aside)
    manifest = dataclasses.replace(plan.manifest, tables=tables)
    words = {name: entry.words for name, entry in plan.vocabularies.items() if entry.words is not None}
    encoder = sequences.Encoder(running, plan.rows.log, words)
    # The log is encoded with one set of vocabularies for all splits; a split is a selection of these rows.
    items = encoder.items()
    rows = counters.add(running, plan.rows)
    rows_of = sequences.rows_in_buckets(encoder, rows, items, manifest.max_history_length)
    written = {
        name: write.write_split(running, rows_of(name), manifest, name, aside / folder, options)
        for name, folder in plan.splits.items()
    }
    if MODES[options.mode].ONLY is None:
        write.write_items(running, sequences.item_rows(encoder, items), encoder.log, aside, options)
    counters.write(running, encoder.log, aside)
    return plan.finish(manifest, written, aside)


def report(manifest: schema.Manifest) -> None:
    """Prints what was built and what was left out."""
    for split in manifest.splits:
        print(
            f"  {split.name:<9} {split.num_rows:>11,} rows {split.num_history_tokens:>13,} history tokens "
            f"{split.num_candidates:>12,} candidates"
        )
    for table in manifest.tables:
        progress.say(f"  table {table.name:<24} {table.num_rows:>11,} rows")
    for reason, count in manifest.skipped.items():
        progress.say(f"  skipped {count:,}: {reason}")


if __name__ == "__main__":
    sys.exit(run_main(main))
