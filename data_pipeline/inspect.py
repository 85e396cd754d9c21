"""Shows on one page what is in a data set, and what to mend first.

python -m data_pipeline.inspect OUT                      # a built data set
python -m data_pipeline.inspect OUT --html page.html     # the same page for a browser
python -m data_pipeline.inspect RAW                      # a raw log with a schema.toml: built aside, and removed
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m data_pipeline.inspect ...")

from gpsd_dist.cli.missing import require

if __name__ == "__main__":
    require("ibis", "duckdb")

import argparse
import collections.abc
import dataclasses
import datetime
import html
import pathlib
import tempfile

import numpy as np
import rich.table
import rich.text

from data_pipeline import build, measures
from gpsd_dist import schema
from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.data import data_versions
from gpsd_dist.disk.console import Console
from gpsd_dist.disk.text import say_error
from gpsd_dist.disk.writing import write

LEAK_AUC = 0.95
ORDERS_A_DAY = 0.15  # mean AUC inside of a user's day that far from 0.5; untuned
DRIFTED = {True: 0.5, False: 0.5}  # numbers: deviations of train; categories: share that moved; untuned
OUTLIER = 100.0  # times the range from the 1 % to the 99 % quantile; untuned
HEAVY = 0.05  # share of all sample weight that one candidate has; untuned
MAX_DAYS = 60
NO_HISTORY = "no user has two events in it: does [history] hold all behaviour?"
NO_REQUEST = "move the borders of the splits"
SAMPLING = "Sample weights, and share of negatives that the log kept"


@dataclasses.dataclass(frozen=True)
class Section:
    """Holds one table of the page."""

    title: str
    columns: tuple[str, ...]
    rows: collections.abc.Sequence[tuple[str, ...]]


def page(root: pathlib.Path) -> tuple[list[Section], list[str]]:
    """Measures the data set in `root`; returns its tables, and in words what to mend, the worst first."""
    manifest = schema.read_manifest(root)
    samples = {split.name: measures.sample(root, manifest, split) for split in manifest.splits}
    sections = [_files(manifest), _splits(manifest, samples), _users(samples), _days(samples)]
    sections += [
        _labels(manifest, samples),
        _sampling(manifest, samples),
        _unknown(samples),
        _numbers(manifest, samples),
        _features(manifest, samples),
    ]
    return [section for section in sections if section.rows], _verdict(manifest, samples)


def _files(manifest: schema.Manifest) -> Section:
    rows = [(entry["name"], f"{entry.get('rows', '')}", f"{entry['bytes']:,}") for entry in manifest.sources]
    rows += [(f"left out: {reason}", f"{count:,}", "") for reason, count in manifest.skipped.items()]
    return Section("Raw files, and rows left out", ("file", "rows", "bytes"), rows)


def _splits(manifest: schema.Manifest, samples: dict[str, measures.Sample]) -> Section:
    rows = []
    for split in manifest.splits:
        lengths = samples[split.name].history_lengths
        middle = f"{np.median(lengths):.0f}" if len(lengths) else ""
        empty = f"{(lengths == 0).mean():.1%}" if len(lengths) else ""
        rows.append(
            (split.name, f"{split.num_rows:,}", f"{split.num_candidates:,}", middle, empty, _date(split.time_from_s),
             _date(split.time_to_s))
        )  # fmt: skip
    columns = ("split", "rows", "candidates", "events of history (median)", "empty histories", "from", "to (UTC)")
    return Section("Splits", columns, rows)


def _users(samples: dict[str, measures.Sample]) -> Section:
    rows = []
    for name, found in samples.items():
        if "user_hash" in found.values and len(found.values["user_hash"]):
            _, counts = np.unique(found.values["user_hash"], return_counts=True)
            quantiles = [f"{np.quantile(counts, q):,.0f}" for q in (0.5, 0.9, 0.99, 1)]
            rows.append((name, f"{len(counts):,}", *quantiles, f"{counts.max() / counts.sum():.1%}"))
    columns = ("split", "users", "rows or candidates (median)", "90 %", "99 %", "longest user", "share of the longest")
    return Section("Users", columns, rows)


def _days(samples: dict[str, measures.Sample]) -> Section:
    times = [found.values["request_time_s"] for found in samples.values() if "request_time_s" in found.values]
    if not times:
        return Section("Candidates by day", (), [])
    days, counts = np.unique(np.concatenate(times) // measures.DAY_S, return_counts=True)
    shown = slice(max(0, len(days) - MAX_DAYS), None)
    rows = [(_date(int(d) * measures.DAY_S)[:10], f"{c:,}") for d, c in zip(days[shown], counts[shown], strict=True)]
    return Section(f"Candidates by day (UTC; the last {MAX_DAYS} days)", ("day", "candidates"), rows)


def _labels(manifest: schema.Manifest, samples: dict[str, measures.Sample]) -> Section:
    rows = []
    for task in manifest.tasks:
        for name, found in samples.items():
            if (labels := found.values.get(f"label.{task.name}")) is not None:
                known = labels[~np.isnan(labels)]
                rate = f"{known.mean():.2%}" if len(known) else "none"
                row: tuple[str, ...] = (task.name, name, f"{len(known):,}", f"{int(known.sum()):,}", rate)
                if (counts := measures.counts_of(found, task)) is not None:
                    counts = counts[~np.isnan(labels)]
                    row += (f"{(counts * known).sum() / counts.sum():.2%}" if counts.sum() else "none",)
                rows.append(row)
    columns = ("task", "split", "observed", "positive", "rate", "rate with weights, of the whole log")
    return Section("Labels", columns[: len(rows[0]) if rows else 0], rows)


def _sampling(manifest: schema.Manifest, samples: dict[str, measures.Sample]) -> Section:
    rows = []
    for column in (f"sampling.{name}" for name in manifest.sampling):
        for name, found in samples.items():
            values = found.values.get(column, np.zeros(0)).astype(np.float64)
            if len(values):
                quantiles = [f"{np.quantile(values, q):.6g}" for q in (0, 0.5, 0.99, 1)]
                largest = f"{values.max() / values.sum():.1%}" if values.any() else ""
                rows.append((column, name, *quantiles, f"{values.mean():.6g}", f"{(values == 0).mean():.1%}", largest))
    columns = ("column", "split", "least", "median", "99 %", "largest", "mean", "0", "share of the largest")
    return Section(SAMPLING, columns, rows)


def _unknown(samples: dict[str, measures.Sample]) -> Section:
    shares = [(column, name, share) for name, found in samples.items() for column, share in found.unknown.items()]
    rows = [(column, name, f"{share:.1%}" if share >= 0.001 else "< 0.1%") for column, name, share in shares if share]
    title = "Ids that training does not know (columns and splits that are not listed: none)"
    return Section(title, ("column", "split", "share"), sorted(rows))


def _numbers(manifest: schema.Manifest, samples: dict[str, measures.Sample]) -> Section:
    rows = []
    for column in _columns(manifest, samples, "numerical"):
        values = samples["train"].values[column]
        if len(values):
            quantiles = [f"{np.quantile(values, q):.6g}" for q in (0, 0.01, 0.5, 0.99, 1)]
            rows.append((column, *quantiles, f"{(values == 0).mean():.1%}"))
    return Section("Numbers in train", ("column", "least", "1 %", "median", "99 %", "largest", "0 or missing"), rows)


def _features(manifest: schema.Manifest, samples: dict[str, measures.Sample]) -> Section:
    rows = [
        (column, f"{alone:.3f}", "-" if np.isnan(inside) else f"{inside:.3f}", f"{moved:.2f}")
        for column, alone, inside, moved in _judged(manifest, samples)
    ]
    title = f"Features alone, task {manifest.tasks[0].name!r}, judged on test" if rows else ""
    return Section(title, ("column", "AUC alone", "AUC inside of a user's day", "drift train to test"), rows)


def _columns(manifest: schema.Manifest, samples: dict[str, measures.Sample], kind: str) -> list[str]:
    columns = samples["train"].values if "train" in samples else {}
    named = [(name, name.partition(".")) for name in columns]
    return [n for n, (place, _, f) in named if place in ("candidate", "context") and manifest.feature(f).kind == kind]


def _judged(
    manifest: schema.Manifest, samples: dict[str, measures.Sample]
) -> collections.abc.Iterator[tuple[str, float, float, float]]:
    """Yields (column, AUC alone, AUC inside of a user's day, drift) of each feature of candidates and requests."""
    train, test = samples.get("train"), samples.get("test")
    if train is None or test is None or not manifest.tasks or not len(test.values.get("user_hash", ())):
        return
    label = f"label.{manifest.tasks[0].name}"
    for kind in ("numerical", "categorical"):
        for column in _columns(manifest, samples, kind):
            is_number = kind == "numerical"
            inside = measures.auc_within_user_days(test, column, label) if is_number else float("nan")
            alone = measures.single_feature_auc(train, test, column, label, is_number)
            yield column, alone, inside, measures.drift(train, test, column, is_number)


def _verdict(manifest: schema.Manifest, samples: dict[str, measures.Sample]) -> list[str]:
    """Says what to mend, the worst first."""
    found = [
        f"split {split.name!r} has no rows: {NO_HISTORY if split.name == 'pretrain' else NO_REQUEST}"
        for split in manifest.splits
        if not split.num_rows
    ]
    for task in manifest.tasks:
        for name, data in samples.items():
            labels = data.values.get(f"label.{task.name}", np.zeros(0))
            known = labels[~np.isnan(labels)]
            if len(labels) and len(np.unique(known)) < 2:
                found.append(f"task {task.name!r} has {len(np.unique(known))} classes in {name!r}: no AUC there")
    judged = list(_judged(manifest, samples))
    found += [
        f"{column} alone has an AUC of {alone:.3f} on test: is it known before the label, or made of it?"
        for column, alone, *_ in judged
        if alone > LEAK_AUC
    ]
    found += [
        f"{column} orders a user's day by its labels (AUC {inside:.3f} inside of it): does it count that day?"
        for column, _, inside, _ in judged
        if abs(inside - 0.5) > ORDERS_A_DAY
    ]
    for name, data in samples.items():
        if len(data.history_lengths) and (data.history_lengths == 0).mean() > 0.5:
            share = (data.history_lengths == 0).mean()
            found.append(f"{share:.0%} of the histories of {name!r} are empty: do the user ids of the logs agree?")
    for name, data in samples.items():
        weights = data.values.get("sampling.weight", np.zeros(0)).astype(np.float64)
        if weights.any() and weights.max() > HEAVY * weights.sum() and len(weights) > 1 / HEAVY:
            share = weights.max() / weights.sum()
            found.append(f"one candidate of {name!r} has {share:.0%} of all sample weight: is it an outlier?")
    for name, data in samples.items():
        found += [f"{share:.0%} of {c} in {name!r} are unknown" for c, share in data.unknown.items() if share > 0.5]
    found += _outliers(manifest, samples)
    found += [
        f"{column} moved from train to test (drift {moved:.2f})"
        for column, _, _, moved in judged
        if moved > DRIFTED[manifest.feature(column.partition(".")[2]).kind == "numerical"]
    ]
    return found + [f"warning of the build: {text}" for text in manifest.options.get(build.WARNINGS, [])]


def _outliers(manifest: schema.Manifest, samples: dict[str, measures.Sample]) -> list[str]:
    found = []
    for column in _columns(manifest, samples, "numerical"):
        values = samples["train"].values[column]
        low, middle, high = np.quantile(values, (0.01, 0.5, 0.99)) if len(values) else (0.0, 0.0, 0.0)
        worst = max(abs(values.max() - middle), abs(values.min() - middle)) if len(values) else 0.0
        if high > low and worst > OUTLIER * (high - low):
            found.append(
                f"{column} has outliers ({values.min():.6g} ... {values.max():.6g}, but 98 % lie in {low:.6g} ... "
                f"{high:.6g}): they make all other values look alike; cut them off"
            )
    return found


def _date(epoch_s: int | None) -> str:
    if epoch_s is None:
        return ""
    try:
        return datetime.datetime.fromtimestamp(epoch_s, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return str(epoch_s)


def show(sections: list[Section], verdict: list[str]) -> None:
    """Prints the page."""
    console = Console(soft_wrap=True)
    for section in sections:
        table = rich.table.Table(*section.columns, title=section.title, title_justify="left", expand=False)
        for row in section.rows:
            table.add_row(*(rich.text.Text(cell) for cell in row))
        console.print(table)
    console.print("What to mend first:" if verdict else "Nothing to mend was found.")
    for number, text in enumerate(verdict, start=1):
        console.print(f"  {number}. {text}")


def as_html(title: str, sections: list[Section], verdict: list[str]) -> str:
    """Makes the page for a browser: one file, no scripts."""
    parts = [f"<h1>{html.escape(title)}</h1>", "<h2>What to mend first</h2>"]
    items = "".join(f"<li>{html.escape(text)}</li>" for text in verdict)
    parts.append(f"<ol>{items}</ol>" if verdict else "<p>Nothing was found.</p>")
    for section in sections:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in section.columns)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in section.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(section.title)}</h2><table><tr>{head}</tr>{body}</table>")
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:left;border-bottom:1px solid #ccc}"
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return head + "".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 with one line if the folder cannot be read."""
    parser = Parser(prog="python -m data_pipeline.inspect", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=pathlib.Path, help="a built data set, or raw files with a schema")
    parser.add_argument("--schema", type=pathlib.Path, help="of raw files; default schema.toml in the folder")
    parser.add_argument("--html", type=pathlib.Path, help="also write the page to this file")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as aside:
            root = data_versions.opened(options.folder)
            if not (root / schema.MANIFEST_NAME).is_file() and (options.schema or (root / "schema.toml").is_file()):
                root = pathlib.Path(aside) / "data"
                command = ["--source", "generic", "--raw_dir", str(options.folder), "--out_dir", str(root)]
                command += ["--schema", str(options.schema)] if options.schema else []
                if status := build.main([*command, "--allow_empty"]):
                    return status
                root = data_versions.current(root)
            sections, verdict = page(root)
    except (ValueError, OSError) as error:
        return say_error(error)
    show(sections, verdict)
    if options.html:
        write(options.html, as_html(str(options.folder), sections, verdict).encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
