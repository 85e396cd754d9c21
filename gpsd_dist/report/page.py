"""Makes one HTML page about run folders: collects tables and figures, and fills the template `page.html.jinja`."""

import dataclasses
import pathlib
import typing

import jinja2

from gpsd_dist.report import curves, dataset, results, setup
from gpsd_dist.report.beside import Beside, Floor, find_beside, floors_of
from gpsd_dist.report.every_day import EveryDay, every_day
from gpsd_dist.report.families import Family, group, seed_text
from gpsd_dist.report.figures import has_shapes, style_color, style_dash
from gpsd_dist.report.fit_summary import FitSummary, fit_summary
from gpsd_dist.report.other_scores import predictions_table, serving_table
from gpsd_dist.report.run_folder import Run, find_runs, read_runs
from gpsd_dist.report.tables import time_text

_OPEN_UP_TO = 6  # entries; a longer list starts folded


@dataclasses.dataclass(frozen=True)
class Report:
    """Holds a page, and the counts that the command prints."""

    html: str
    num_runs: int
    num_problems: int


def make_report(places: typing.Sequence[pathlib.Path]) -> Report:
    """Reports on every run in and below `places`; equal files give equal bytes. ValueError where `find_runs` raises."""
    folders, problems = find_runs(places)
    runs = read_runs(folders)
    data_sets, data_problems = dataset.data_sets(runs)
    families = group(runs, data_sets)
    beside = find_beside(places)
    problems += [problem for run in runs for problem in run.problems] + data_problems + list(beside.problems)
    contexts = [_family_context(family, floors_of(family.runs, beside.floors, problems)) for family in families]
    for context, link in zip(contexts, _links([family.title for family in families]), strict=True):
        context["link"] = link
    html = _template().render(
        title=f"Run {runs[0].label}" if len(runs) == 1 else f"Report on {len(runs)} runs",
        fits=_fits(beside, problems),
        daily=_daily(beside, problems),
        runs=runs,
        run_span=_span(runs),
        problems=problems,
        families=contexts,
        highlights=[(c["family"], r.highlight) for c in contexts for r in c["results"] if r.highlight],
        predictions=predictions_table(beside.predictions, problems),
        serving=serving_table(beside.serving),
        throughput=setup.throughput(families),
        speed_figures=[figure for family in families if (figure := curves.speed_figure(family))],
        data_sets=[_data_context(data_set) for data_set in data_sets],
        family_differences=setup.family_differences(families),
        plans=setup.plans(families),
        environment=setup.environments([run for family in families for run in family.runs]),
        open_up_to=_OPEN_UP_TO,
    )
    return Report(html, len(runs), len(problems))


def _fits(beside: Beside, problems: list[str]) -> list[FitSummary]:
    fits = []
    for folder, summary in beside.fits:
        try:
            fits.append(fit_summary(folder.name, summary))
        except ValueError as error:
            problems.append(f"{error}, left out")
    return fits


def _daily(beside: Beside, problems: list[str]) -> list[EveryDay]:
    found = []
    for number, (folder, record) in enumerate(beside.daily):
        try:
            found.append(every_day(folder.name, record, number))
        except ValueError as error:
            problems.append(f"{error}, left out")
    return found


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gpsd_dist.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"style_color": style_color, "style_dash": style_dash}
    return environment.get_template("page.html.jinja")


def _span(runs: typing.Sequence[Run]) -> str:
    """Says from when to when the runs logged, by their own clocks."""
    times = [entry["wall_time_s"] for run in runs for entry in run.entries if entry.get("wall_time_s", 0) > 0]
    return f"{time_text(min(times))} to {time_text(max(times))} UTC" if times else ""


def _links(titles: typing.Sequence[str]) -> list[str]:
    """Leaves out the folders above the data, as a phone is narrow, but for those that tell two links apart."""
    parts = [pathlib.PurePath(title).parts for title in titles]
    tails = [[pathlib.PurePath(*one[-length:]).as_posix() for length in range(1, len(one) + 1)] for one in parts]
    everywhere = [tail for one in tails for tail in one]
    return [next((tail for tail in one if everywhere.count(tail) == 1), one[-1]) for one in tails]


def _family_context(family: Family, floors: typing.Sequence[Floor]) -> dict[str, typing.Any]:
    return {
        "family": family,
        "has_shapes": has_shapes(len(family.configurations)),
        "num_seeds": max(len(made.runs) for made in family.configurations),
        "results": results.task_results(family, floors),
        "x_axis": curves.x_axis(family),
        "stopped": [run.label for run in family.runs if run.is_stopped_early],
        "ends": [(run.label, f"{run.outcome['ended']}") for run in family.runs if run.outcome.get("ended")],
        "training": curves.training_figures(family),
        "gaps": curves.gap_figures(family),
        "pairs": curves.loss_pairs(family),
        "differences": setup.option_differences(family),
        "shared": setup.shared_options(family),
        "commands": [(run.label, setup.command(run)) for run in family.runs],
        "legend": [(made, [(seed_text(run), i) for i, run in enumerate(made.runs)]) for made in family.configurations],
    }


def _data_context(data_set: dataset.DataSet) -> dict[str, typing.Any]:
    manifest = data_set.manifest
    if manifest is None:
        return {"data_set": data_set}
    return {
        "data_set": data_set,
        "splits": dataset.splits_table(manifest),
        "tables": dataset.tables_table(manifest),
        "sources": dataset.sources_table(manifest),
        "facts": dataset.facts(manifest, data_set.origin),
    }
