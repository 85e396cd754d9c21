"""Describes how the runs were made: options that differ, table plan, environment, commands, speed."""

import math
import shlex
import statistics
import typing

from gpsd_dist.cli.names import as_typed, with_plugin
from gpsd_dist.report.families import PLACE_OPTIONS, Family, differing_options
from gpsd_dist.report.run_folder import Run
from gpsd_dist.report.tables import MISSING, Cell, Row, Table, count_text, duration_text, number_cell, option_text
from gpsd_dist.validation import flattened

_ABSENT = "(absent)"
_SPEEDS = {"perf/examples_per_s": "examples/s", "perf/tokens_per_s": "tokens/s", "perf/step_ms": "step ms"}
_PEAKS = (("perf/peak_rss_gib", "peak RSS GiB"), ("perf/peak_cuda_gib", "peak CUDA GiB"), ("perf/mfu", "best MFU"))


def option_differences(family: Family) -> Table | None:
    """Makes one row per configuration, one column per option that differs; None if none differs."""
    names = [name for name in differing_options(family.runs) if name not in PLACE_OPTIONS]
    if not names:
        return None
    rows = []
    for made in family.configurations:
        texts = _texts(made.runs)
        who = Cell(made.label, ", ".join(run.label for run in made.runs), style_index=made.style_index)
        rows.append(Row((who, Cell(made.seeds), *(Cell(texts.get(name, _ABSENT)) for name in names))))
    columns = (Cell("configuration"), Cell("seeds"), *map(Cell, names))
    return Table(columns, (tuple(rows),), caption=f"{family.title}: options that differ")


def shared_options(family: Family) -> list[tuple[str, str]]:
    """Lists (option, value) of all options that are equal in all runs whose configuration is known."""
    runs = [run for run in family.runs if run.config]
    differing = {*differing_options(runs), *PLACE_OPTIONS}
    flat = flattened(runs[0].config) if runs else {}
    return [(name, option_text(value)) for name, value in flat.items() if name not in differing]


def family_differences(families: typing.Sequence[Family]) -> Table | None:
    """Makes a table of options that differ between families, one column per family."""
    if len(families) < 2:
        return None
    values = [_texts(family.runs) for family in families]
    names = list(dict.fromkeys(name for found in values for name in found))
    names = [name for name in names if name not in PLACE_OPTIONS and name != "init_checkpoint"]
    names = [name for name in names if any(found.get(name) != values[0].get(name) for found in values)]
    rows = tuple(Row((Cell(name), *(Cell(found.get(name, _ABSENT)) for found in values))) for name in names)
    columns = (Cell("option"), *(Cell(family.title) for family in families))
    return Table(columns, (rows,), caption="options that differ between the groups") if rows else None


def _texts(runs: typing.Sequence[Run]) -> dict[str, str]:
    """Maps each option to its values in these runs, each once."""
    flats = [flattened(run.config) for run in runs]
    texts: dict[str, dict[str, None]] = {name: {} for flat in flats for name in flat}
    for name, found in texts.items():
        found.update((option_text(flat[name]) if name in flat else _ABSENT, None) for flat in flats)
    return {name: "; ".join(found) for name, found in texts.items()}


def plans(families: typing.Sequence[Family]) -> list[tuple[str, str]]:
    """Lists (labels of the runs, plan), equal plans once."""
    by_plan: dict[str, list[str]] = {}
    for family in families:
        for run in family.runs:
            if run.plan:
                by_plan.setdefault(run.plan, []).append(run.label)
    return [(", ".join(labels), plan) for plan, labels in by_plan.items()]


def environments(runs: typing.Sequence[Run]) -> tuple[list[tuple[str, str]], Table | None]:
    """Lists facts that all runs share, and makes a table of the others, equal runs in one row."""
    flats = {run.label: _environment(run) for run in runs if run.environment}
    names = list(dict.fromkeys(name for flat in flats.values() for name in flat))
    shared, differing = [], []
    for name in names:
        values = {flat.get(name, _ABSENT) for flat in flats.values()}
        (differing if len(values) > 1 else shared).append(name)
    first: dict[str, str] = next(iter(flats.values()), {})
    groups: dict[tuple[str, ...], list[str]] = {}
    for label, flat in flats.items():
        groups.setdefault(tuple(flat.get(name, _ABSENT) for name in differing), []).append(label)
    rows = tuple(Row((Cell(", ".join(labels)), *map(Cell, values))) for values, labels in groups.items())
    table = Table((Cell("runs"), *map(Cell, differing)), (rows,), caption="what differs between the runs")
    return [(name, first[name]) for name in shared], table if differing else None


def _environment(run: Run) -> dict[str, str]:
    facts = {name: value for name, value in run.environment.items() if name not in ("argv", "versions")}
    versions = run.environment.get("versions")
    facts |= versions if isinstance(versions, dict) else {}
    return {
        name: "not installed" if value is None and name != "commit" else f"{value}" for name, value in facts.items()
    }


def command(run: Run) -> str | None:
    """Writes the run's command line for the repository's root; None if it was not recorded.

    More than one rank means torchrun, on one machine; how the ranks were spread is not recorded.
    """
    argv = run.environment.get("argv")
    if not isinstance(argv, list) or not argv:
        return None
    world_size = run.environment.get("world_size")
    is_alone = not isinstance(world_size, int) or world_size <= 1
    launcher = ["python"] if is_alone else ["torchrun", "--nproc_per_node", f"{world_size}"]
    words = as_typed(shlex.join([*launcher, "-m", "gpsd_dist.train", *map(str, argv[1:])]))
    return with_plugin(words, f"{run.environment.get('plugin') or ''}")


def throughput(families: typing.Sequence[Family]) -> Table:
    """Makes a table of each run's speed: medians over its log steps, and peaks of memory."""
    has_cuda = any("perf/peak_cuda_gib" in entry for family in families for run in family.runs for entry in run.entries)
    peaks = _PEAKS if has_cuda else _PEAKS[:1]
    headers = ["ranks", "steps", "time", *_SPEEDS.values(), "data wait", "CPU time"]
    headers += [header for _, header in peaks]
    columns = (Cell("run"), Cell("device"), *map(number_cell, headers))
    groups = []
    for family in families:
        rows = [Row(tuple(_speed_cells(run, peaks))) for run in family.runs]
        groups.append(tuple(rows))
    return Table(columns, tuple(groups), caption="medians over the log steps; peaks and MFU are the largest value")


def _speed_cells(run: Run, peaks: typing.Sequence[tuple[str, str]]) -> list[Cell]:
    times = [entry["wall_time_s"] for entry in run.entries if math.isfinite(entry.get("wall_time_s", math.nan))]
    steps = count_text(run.entries[-1]["step"]) if run.entries else MISSING
    cells = [Cell(run.label), Cell(f"{run.environment.get('device', MISSING)}")]
    cells += [number_cell(f"{run.environment.get('world_size', MISSING)}"), number_cell(steps)]
    cells.append(number_cell(duration_text(times[-1] - times[0]) if len(times) > 1 else MISSING))
    for name in _SPEEDS:
        median = _median(run, name)
        cells.append(number_cell(MISSING if median is None else f"{median:,.0f}"))
    wait = _median(run, "perf/data_wait_share")
    cells.append(number_cell(MISSING if wait is None else f"{100 * wait:.2f} %"))
    used = _finite(run, "perf/cpu_s")
    cells.append(number_cell(duration_text(used[-1]) if used else MISSING))
    for name, _ in peaks:
        values = _finite(run, name)
        cells.append(number_cell(f"{max(values):.2f}" if values else MISSING))
    return cells


def _finite(run: Run, name: str) -> list[float]:
    return [value for _, value in run.series(name) if math.isfinite(value)]


def _median(run: Run, name: str) -> float | None:
    values = _finite(run, name)
    return statistics.median(values) if values else None
