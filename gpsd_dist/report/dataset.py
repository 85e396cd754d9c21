"""Describes the data sets as they were when runs were trained on them, and says whether a folder has changed."""

import collections.abc
import dataclasses
import math
import os
import pathlib
import typing

from gpsd_dist import schema
from gpsd_dist.data import data_versions
from gpsd_dist.report.run_folder import Run
from gpsd_dist.report.tables import (
    MISSING,
    Cell,
    Row,
    Table,
    bytes_text,
    count_text,
    listed,
    number_cell,
    time_text,
)
from gpsd_dist.schema import Manifest


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Holds one version of one data folder, and the runs that were trained on it."""

    name: str
    data_dir: str
    manifest: Manifest | None  # None if neither the folder nor a checkpoint has one
    origin: str  # where the manifest was read
    runs: tuple[Run, ...]


def data_sets(runs: typing.Sequence[Run]) -> tuple[list[DataSet], list[str]]:
    """Lists the data sets of the runs by folder and age, and sentences about those gone, broken or rebuilt since.

    A checkpoint holds the manifest that its run was trained with; that one counts, because a folder can be rebuilt. The
    folder's own is used for runs without a checkpoint.
    """
    on_disk: dict[str, tuple[Manifest | None, str]] = {}
    found: dict[tuple[str, collections.abc.Hashable], list[tuple[Run, Manifest | None, str]]] = {}
    problems = []
    for run in runs:
        data_dir = f"{run.config.get('data_dir') or '(unknown data)'}"
        if data_dir not in on_disk:
            on_disk[data_dir] = _read(data_dir)
        current, saved = on_disk[data_dir][0], None
        try:
            saved = schema.manifest_from_dict(run.state["manifest"]) if "manifest" in run.state else None
        except ValueError as error:
            problems.append(f"the manifest in the checkpoint of {run.label} is left out: {error}")
        manifest, origin = saved, "a checkpoint of these runs"
        if saved is None or _content(saved) == _content(current):
            manifest, origin = current, f"{data_dir}/{schema.MANIFEST_NAME}"
        found.setdefault((data_dir, _content(manifest)), []).append((run, manifest, origin))
    versions: dict[str, int] = {}
    result = []
    roots = [str(data_versions.root_of(folder)) for folder in on_disk]
    for data_dir, content in sorted(found, key=lambda key: (key[0], min(_start_s(run) for run, _, _ in found[key]))):
        members = found[data_dir, content]
        versions[data_dir] = versions.get(data_dir, 0) + 1
        is_one = sum(other == data_dir for other, _ in found) == 1
        root = str(data_versions.root_of(data_dir))
        shown = root if roots.count(root) == 1 else data_dir  # OUT, not OUT/versions/0001-..., where that is clear
        name = shown if is_one else f"{shown}, version {versions[data_dir]}"
        made = DataSet(name, data_dir, members[0][1], members[0][2], tuple(run for run, _, _ in members))
        result.append(made)
        problems += _remarks(made, *on_disk[data_dir])
    return result, problems


def _start_s(run: Run) -> float:
    """Returns when the run logged first: older versions of a folder come first."""
    return min((entry.get("wall_time_s", math.inf) for entry in run.entries), default=math.inf)


def _read(data_dir: str) -> tuple[Manifest | None, str]:
    """Reads the folder's manifest; None and the reason if it cannot be read."""
    try:
        return schema.read_manifest(data_versions.current(data_dir)), ""
    except (ValueError, OSError) as error:
        is_gone = not os.path.isdir(data_dir)
        return None, f"the folder {data_dir} is not here (seen from {pathlib.Path.cwd()})" if is_gone else str(error)


def _remarks(data_set: DataSet, current: Manifest | None, reason: str) -> list[str]:
    who = listed([run.label for run in data_set.runs])
    if data_set.manifest is None:
        return [f"data of {who}: {reason}, and no checkpoint has a manifest; the data summary is missing"]
    if current is None:
        return [f"data of {who}: {reason}; the data summary is what their checkpoints say"]
    if _content(current) != _content(data_set.manifest):
        return [
            f"{data_set.data_dir} has been built again since {who} were trained; the data summary is what their "
            "checkpoints say, and scores from before and after do not compare",
        ]
    return []


def _content(manifest: Manifest | None) -> collections.abc.Hashable:
    """Keeps what is equal in two builds of equal data: no commands, options or paths; mean and std follow from rows."""
    if manifest is None:
        return None
    features = tuple(dataclasses.replace(feature, mean=0.0, std=1.0, quantiles=()) for feature in manifest.features)
    sizes = (manifest.max_history_length, manifest.item_feature)
    return features, manifest.tables, manifest.tasks, manifest.splits, sizes


def splits_table(manifest: Manifest) -> Table:
    """Makes a table of rows, tokens, candidates and times of every split."""
    headers = ("rows", "history tokens", "tokens per row", "candidates")
    columns = (Cell("split"), *map(number_cell, headers), Cell("from (UTC)"), Cell("to (UTC)"))
    rows = []
    for split in manifest.splits:
        ratio = f"{split.num_history_tokens / split.num_rows:.1f}" if split.num_rows else MISSING
        candidates = count_text(split.num_candidates or None)
        counts = (count_text(split.num_rows), count_text(split.num_history_tokens), ratio, candidates)
        times = (time_text(split.time_from_s), time_text(split.time_to_s))
        rows.append(Row((Cell(split.name), *map(number_cell, counts), *map(Cell, times))))
    return Table(columns, (tuple(rows),))


def tables_table(manifest: Manifest) -> Table:
    """Makes a table of embedding tables: size, and the features that read each."""
    rows = []
    for table in manifest.tables:
        users = [f"{f.name} ({'/'.join(f.places)})" for f in manifest.features if f.table == table.name]
        rows.append(Row((Cell(table.name), number_cell(count_text(table.num_rows)), Cell(", ".join(users)))))
    return Table((Cell("table"), number_cell("rows"), Cell("features (places)")), (tuple(rows),))


def sources_table(manifest: Manifest) -> Table:
    """Makes a table of raw files."""
    rows = []
    for source in manifest.sources:
        name, size = Cell(f"{source.get('path', source.get('name'))}"), number_cell(bytes_text(source.get("bytes")))
        rows.append(Row((name, size, Cell(f"{source.get('sha256', '')}"[:12]))))
    return Table((Cell("raw file"), number_cell("size"), Cell("sha256 begins")), (tuple(rows),))


def facts(manifest: Manifest, origin: str) -> list[tuple[str, str]]:
    """Lists (name, text) of everything that is not a table. `origin`: where the manifest was read."""
    tasks = [task.name + (f" (given {task.given})" if task.given else "") for task in manifest.tasks]
    numerical = [feature.name for feature in manifest.features if feature.kind == "numerical"]
    skipped = [f"{count_text(number)} {why}" for why, number in manifest.skipped.items()]
    return [
        ("source", manifest.source),
        ("tasks", ", ".join(tasks) or MISSING),
        ("split rule", manifest.split_rule or MISSING),
        ("skipped raw rows", "; ".join(skipped) or "none"),
        ("longest history", f"{manifest.max_history_length} events"),
        ("numerical features", ", ".join(numerical) or "none"),
        ("built with", manifest.command or MISSING),
        ("manifest read from", origin),
    ]
