"""Groups runs: a family shares data and stage; inside it, a configuration shares all options but the seed."""

import copy
import dataclasses
import json
import os
import pathlib
import typing

from gpsd_dist.config import STRATEGIES
from gpsd_dist.config.model import size_text
from gpsd_dist.report import dataset
from gpsd_dist.report.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, Run
from gpsd_dist.report.tables import option_text
from gpsd_dist.validation import flattened

PLACE_OPTIONS = ("output_dir", "seed")  # say where the run is and how it is seeded, not what it does
_RUN_OPTIONS = ("init_checkpoint", "refit_of")  # name another run
_MAX_DEPTH = 3  # refit -> run -> pretraining
_OPTIONS_IN_LABEL = 2


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Holds runs that differ in their seed only, by seed."""

    label: str
    style_index: int  # colour and marker of its lines
    runs: tuple[Run, ...]

    @property
    def is_refit(self) -> bool:
        """Whether it was trained on `valid` too, so that it has no validation."""
        return any(run.config.get("refit_of") for run in self.runs)

    @property
    def seeds(self) -> str:
        return ", ".join(seed_text(run) for run in self.runs)


@dataclasses.dataclass(frozen=True)
class Family:
    """Holds runs of one stage on one data set, which may share an axis and a table."""

    title: str
    anchor: str
    stage: str  # Empty if the configuration is lost
    configurations: tuple[Configuration, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for configuration in self.configurations for run in configuration.runs]


def seed_text(run: Run) -> str:
    """Returns the run's seed, "?" if its configuration is lost."""
    return f"{run.config.get('seed', '?')}"


def model_text(run: Run) -> str:
    """Names the tower and the sizes that it reads: transformer L4H64A4, din H64."""
    model = run.config.get("model")
    if not isinstance(model, dict):
        return "?"
    return f"{model.get('name', '?')} {size_text(model)}"


def strategy_text(run: Run) -> str:
    """Names the strategy, NT, ST, ..., with "refit" if the run repeats another one on more data."""
    if run.config.get("stage") == "pretrain":
        return "pretraining"
    return f"{run.config.get('strategy', '?')}" + (" refit" if run.config.get("refit_of") else "")


def differing_options(runs: typing.Sequence[Run]) -> list[str]:
    """Lists dotted names of options that differ between runs, in the order of run_config.json."""
    flats = [flattened(run.config) for run in runs]
    names = list(dict.fromkeys(name for flat in flats for name in flat))
    return [
        name for name in names if any((name in f, f.get(name)) != (name in flats[0], flats[0].get(name)) for f in flats)
    ]


_STAGES = ("pretrain", "finetune")  # other ones come after these


def group(runs: typing.Sequence[Run], data_sets: typing.Sequence[dataset.DataSet]) -> list[Family]:
    """Sorts families by data set, pretraining first; their configurations by strategy, in the order of the paper."""
    place = {id(run): index for index, data_set in enumerate(data_sets) for run in data_set.runs}
    by_family: dict[tuple, list[Run]] = {}
    for run in runs:
        stage = run.config.get("stage")
        by_family.setdefault((place[id(run)], stage if isinstance(stage, str) else ""), []).append(run)
    keys = sorted(by_family, key=lambda key: (key[0], key[1] not in _STAGES, key[1] == "finetune", key[1]))
    families = []
    for data_index, stage in keys:
        members = by_family[data_index, stage]
        known = {"pretrain": "pretraining", "finetune": "finetuning", "": "unknown stage"}
        what = known.get(stage, f"stage {stage}")
        title = f"{data_sets[data_index].name}: {what}"
        families.append(Family(title, f"family-{len(families) + 1}", stage, _configurations(members, runs)))
    return families


def _configurations(members: list[Run], runs: typing.Sequence[Run]) -> tuple[Configuration, ...]:
    by_key: dict[str, list[Run]] = {}
    for run in members:
        by_key.setdefault(configuration_key(run, runs), []).append(run)
    groups = [sorted(group, key=lambda run: (seed_text(run).zfill(9), run.label)) for group in by_key.values()]
    groups.sort(key=lambda group: (_strategy_order(group[0]), strategy_text(group[0]), group[0].label))
    labels = _labels(groups)
    return tuple(Configuration(label, i, tuple(g)) for i, (label, g) in enumerate(zip(labels, groups, strict=True)))


def _strategy_order(run: Run) -> int:
    strategy = run.config.get("strategy")
    return STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES)


def configuration_key(run: Run, runs: typing.Sequence[Run]) -> str:
    """Makes a key that is equal for runs that differ in seed (and folder) only.

    A run that this one starts from or repeats counts by its own options, not by its path, so that seeds with a
    pretraining each are still seeds of one configuration. One that is neither among `runs` nor on disk counts by path.
    """
    if not run.config:
        return f"unknown {run.label}"
    return json.dumps(_key_parts(run.config, runs, depth=0), sort_keys=True, default=str)


def _key_parts(config: dict[str, typing.Any], runs: typing.Sequence[Run], depth: int) -> dict[str, typing.Any]:
    parts = copy.deepcopy({name: value for name, value in config.items() if name not in PLACE_OPTIONS})
    for name in _RUN_OPTIONS:
        value = parts.get(name)
        if isinstance(value, str) and value and depth < _MAX_DEPTH:
            parts[name] = _options_of(value, runs, depth)
    return parts


def _options_of(place: str, runs: typing.Sequence[Run], depth: int) -> typing.Any:
    """Returns the options of the run or checkpoint at `place`; the place itself if it cannot be found."""
    folder, step = pathlib.Path(place), ""
    if folder.parent.name == CHECKPOINTS_NAME:
        folder, step = folder.parent.parent, folder.name
    found = [run.config for run in _runs_at(folder, runs)]
    if not found:
        try:
            found = [json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))]
        except (OSError, ValueError):
            return place
    if not found[0] or not isinstance(found[0], dict):
        return place
    return [step, _key_parts(found[0], runs, depth + 1)]


def _runs_at(folder: pathlib.Path, runs: typing.Sequence[Run]) -> list[Run]:
    """Finds runs that a recorded path may mean, the likeliest first.

    A relative path was relative to a folder that the report does not know, so its end has to do. A run that was moved
    or copied afterwards is still known by the folder that it was written to.
    """
    recorded = pathlib.PurePath(os.path.realpath(folder) if folder.is_absolute() else os.path.normpath(folder))
    places = [pathlib.PurePath(os.path.realpath(run.folder)).parts for run in runs]
    found = [run for run, place in zip(runs, places, strict=True) if place[-len(recorded.parts) :] == recorded.parts]
    return found + [
        run for run in runs if os.path.normpath(f"{run.config.get('output_dir')}") == os.path.normpath(folder)
    ]


def refits(configuration: Configuration, others: typing.Sequence[Configuration]) -> Configuration | None:
    """Finds the one of `others` that repeats a run of this configuration on more data."""
    for other in others:
        places = [run.config.get("refit_of") for run in other.runs]
        if any(_runs_at(pathlib.Path(f"{place}"), configuration.runs) for place in places if place):
            return other
    return None


def _labels(groups: list[list[Run]]) -> list[str]:
    """Labels each configuration of a family: strategy, model if there are several, and the options that differ."""
    firsts = [group[0] for group in groups]
    has_models = len({model_text(run) for run in firsts if run.config}) > 1
    names = [f"{strategy_text(run)} {model_text(run)}" if has_models else strategy_text(run) for run in firsts]
    names = [name if run.config else run.label for name, run in zip(names, firsts, strict=True)]
    labels = []
    for name, run in zip(names, firsts, strict=True):
        alike = [other for other_name, other in zip(names, firsts, strict=True) if other_name == name]
        labels.append(name if len(alike) == 1 else f"{name}, {_distinction(run, alike)}")
    for index, label in enumerate(labels):
        if labels.count(label) > 1:
            labels[index] = f"{label} ({firsts[index].label})"
    return labels


def _distinction(run: Run, alike: list[Run]) -> str:
    options = flattened(run.config)
    names = [name for name in differing_options(alike) if name not in PLACE_OPTIONS]
    shown = [f"{name}={option_text(options.get(name, '?'))}" for name in names[:_OPTIONS_IN_LABEL]]
    more = len(names) - _OPTIONS_IN_LABEL
    return " ".join(shown + [f"and {more} more option{'s' * (more > 1)}"] * (more > 0)) or run.label
