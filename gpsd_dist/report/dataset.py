"""Describes the data sets as they were when runs were trained on them, and says whether a folder has changed."""

import dataclasses
import json
import math
import os
import pathlib
import typing

from gpsd_dist import schema
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

_LISTS = ("features", "splits", "tables", "tasks")
_FEATURE_FIELDS = ("name", "places", "kind", "table", "is_bag")  # without mean and std, which follow from the rows


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Holds one version of one data folder, and the runs that were trained on it."""

    name: str
    data_dir: str
    manifest: dict[str, typing.Any]  # like manifest.json; {} if neither the folder nor a checkpoint has it
    origin: str  # where the manifest was read
    runs: tuple[Run, ...]


def data_sets(runs: typing.Sequence[Run]) -> tuple[list[DataSet], list[str]]:
    """Lists the data sets of the runs by folder and age, and sentences about those gone, broken or rebuilt since.

    A checkpoint holds the manifest that its run was trained with; that one counts, because a folder can be rebuilt. The
    folder's own is used for runs without a checkpoint.
    """
    on_disk: dict[str, tuple[dict[str, typing.Any], str]] = {}
    found: dict[tuple[str, str], list[tuple[Run, dict[str, typing.Any], str]]] = {}
    problems = []
    for run in runs:
        data_dir = f"{run.config.get('data_dir') or '(unknown data)'}"
        if data_dir not in on_disk:
            on_disk[data_dir] = _read(data_dir)
        current, saved = on_disk[data_dir][0], run.state.get("manifest", {})
        manifest = saved or current
        origin = "a checkpoint of these runs" if saved else f"{data_dir}/{schema.MANIFEST_NAME}"
        if saved and current and _content(saved) == _content(current):
            manifest, origin = current, f"{data_dir}/{schema.MANIFEST_NAME}"
        found.setdefault((data_dir, _content(manifest)), []).append((run, manifest, origin))
    versions: dict[str, int] = {}
    result = []
    for data_dir, content in sorted(found, key=lambda key: (key[0], min(_start_s(run) for run, _, _ in found[key]))):
        members = found[data_dir, content]
        versions[data_dir] = versions.get(data_dir, 0) + 1
        is_one = sum(other == data_dir for other, _ in found) == 1
        name = data_dir if is_one else f"{data_dir}, version {versions[data_dir]}"
        made = DataSet(name, data_dir, members[0][1], members[0][2], tuple(run for run, _, _ in members))
        result.append(made)
        problems += _remarks(made, *on_disk[data_dir])
    return result, problems


def _start_s(run: Run) -> float:
    """Returns when the run logged first: older versions of a folder come first."""
    return min((entry.get("wall_time_s", math.inf) for entry in run.entries), default=math.inf)


def _read(data_dir: str) -> tuple[dict[str, typing.Any], str]:
    """Reads the folder's manifest as plain JSON; {} and the reason if it cannot be read."""
    try:
        return json.loads(json.dumps(dataclasses.asdict(schema.read_manifest(data_dir)))), ""
    except (ValueError, OSError) as error:
        is_gone = not os.path.isdir(data_dir)
        return {}, f"the folder {data_dir} is not here (seen from {pathlib.Path.cwd()})" if is_gone else str(error)


def _remarks(data_set: DataSet, current: dict[str, typing.Any], reason: str) -> list[str]:
    who = listed([run.label for run in data_set.runs])
    if not data_set.manifest:
        return [f"data of {who}: {reason}, and no checkpoint has a manifest; the data summary is missing"]
    broken = [name for name in _LISTS if not _is_list_of_objects(data_set.manifest.get(name))]
    found = [f"manifest of {who} ({data_set.origin}): no lists of objects: {', '.join(broken)}"] if broken else []
    if not current:
        return [*found, f"data of {who}: {reason}; the data summary is what their checkpoints say"]
    if _content(current) != _content(data_set.manifest):
        return [
            *found,
            f"{data_set.data_dir} has been built again since {who} were trained; the data summary is what their "
            "checkpoints say, and scores from before and after do not compare",
        ]
    return found


def _content(manifest: dict[str, typing.Any]) -> str:
    """Serializes what is equal in two builds of equal data: no commands, options or paths of raw files."""
    if not manifest:
        return ""
    features = [{f: v.get(f) for f in _FEATURE_FIELDS} for v in _objects(manifest, "features")]
    rest = {name: manifest.get(name) for name in ("tables", "tasks", "splits", "max_history_length", "item_feature")}
    return json.dumps([features, rest], sort_keys=True, default=str)


def _is_list_of_objects(value: typing.Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _objects(manifest: dict[str, typing.Any], name: str) -> list[dict[str, typing.Any]]:
    """Returns the list of objects of that name; entries that are no objects are left out."""
    values = manifest.get(name)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def splits_table(manifest: dict[str, typing.Any]) -> Table:
    """Makes a table of rows, tokens, candidates and times of every split."""
    headers = ("rows", "history tokens", "tokens per row", "candidates")
    columns = (Cell("split"), *map(number_cell, headers), Cell("from (UTC)"), Cell("to (UTC)"))
    rows = []
    for split in _objects(manifest, "splits"):
        num_rows, tokens = split.get("num_rows"), split.get("num_history_tokens")
        has_ratio = isinstance(num_rows, int) and isinstance(tokens, int) and num_rows > 0
        counts = (count_text(num_rows), count_text(tokens), f"{tokens / num_rows:.1f}" if has_ratio else MISSING)
        cells = (
            Cell(f"{split.get('name')}"),
            *map(number_cell, counts),
            number_cell(count_text(split.get("num_candidates") or None)),
        )
        rows.append(Row((*cells, *(Cell(time_text(split.get(key))) for key in ("time_from_s", "time_to_s")))))
    return Table(columns, (tuple(rows),))


def tables_table(manifest: dict[str, typing.Any]) -> Table:
    """Makes a table of embedding tables: size, and the features that read each."""
    users: dict[str, list[str]] = {}
    for feature in _objects(manifest, "features"):
        places = feature.get("places")
        where = "/".join(map(str, places)) if isinstance(places, list) else MISSING
        users.setdefault(f"{feature.get('table')}", []).append(f"{feature.get('name')} ({where})")
    rows = []
    for table in _objects(manifest, "tables"):
        name, num_rows = f"{table.get('name')}", number_cell(count_text(table.get("num_rows")))
        rows.append(Row((Cell(name), num_rows, Cell(", ".join(users.get(name, []))))))
    return Table((Cell("table"), number_cell("rows"), Cell("features (places)")), (tuple(rows),))


def sources_table(manifest: dict[str, typing.Any]) -> Table:
    """Makes a table of raw files."""
    rows = []
    for source in _objects(manifest, "sources"):
        name, size = Cell(f"{source.get('path', source.get('name'))}"), number_cell(bytes_text(source.get("bytes")))
        rows.append(Row((name, size, Cell(f"{source.get('sha256', '')}"[:12]))))
    return Table((Cell("raw file"), number_cell("size"), Cell("sha256 begins")), (tuple(rows),))


def facts(data_set: DataSet) -> list[tuple[str, str]]:
    """Lists (name, text) of everything that is not a table."""
    manifest = data_set.manifest
    tasks = [
        f"{task.get('name')}" + (f" (given {task['given']})" if task.get("given") else "")
        for task in _objects(manifest, "tasks")
    ]
    numerical = [f"{f.get('name')}" for f in _objects(manifest, "features") if f.get("kind") == "numerical"]
    skipped = manifest.get("skipped")
    reasons = [f"{count_text(n)} {why}" for why, n in skipped.items()] if isinstance(skipped, dict) else []
    return [
        ("source", f"{manifest.get('source', MISSING)}"),
        ("tasks", ", ".join(tasks) or MISSING),
        ("split rule", f"{manifest.get('split_rule') or MISSING}"),
        ("skipped raw rows", "; ".join(reasons) or "none"),
        ("longest history", f"{manifest.get('max_history_length', MISSING)} events"),
        ("numerical features", ", ".join(numerical) or "none"),
        ("built with", f"{manifest.get('command') or MISSING}"),
        ("manifest read from", data_set.origin),
    ]
