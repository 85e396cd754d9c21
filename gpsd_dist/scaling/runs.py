"""Finds out which trials of a ladder are finished, and runs the rest, one ordinary command after the other.

A trial is finished when its result file exists. A half-trained run resumes from its checkpoint, as the trainer does
when it gets the same command again. A run whose options differ is never skipped or resumed.
"""

import collections.abc
import dataclasses
import json
import pathlib
import typing

from gpsd_dist.checkpoint import manager, storage
from gpsd_dist.checkpoint.resume import check_resumable, version_of
from gpsd_dist.checkpoint.state import read_run
from gpsd_dist.commands import Stopped, execute
from gpsd_dist.config import run_config_from_dict
from gpsd_dist.config.from_data import left_to_data
from gpsd_dist.data import data_versions
from gpsd_dist.data.run_manifest import read_run_manifest, with_data_version
from gpsd_dist.disk.reading import again
from gpsd_dist.distributed.fork_server import ForkServer
from gpsd_dist.metrics import breakdown
from gpsd_dist.parameter_names import TOWER, dense_weight, is_table, is_weight
from gpsd_dist.scaling.ladder import Training, Trial, checkpoint_in
from gpsd_dist.validation import flattened

PARAMETERS_NAME = "parameters.json"


def check_unchanged(trials: collections.abc.Iterable[Trial]) -> None:
    """Checks, before training, that runs which exist have the planned options. ValueError says what differs."""
    for trial in trials:
        has_result = read_result(trial.result) is not None
        for training in filter(None, (trial.pretraining, trial.finetuning)):
            _check_training(training, trial, is_needed=has_result)


def check_nothing_is_lost(summary: pathlib.Path, trials: collections.abc.Iterable[Trial]) -> None:
    """Checks that `trials` cover every rung and seed of an earlier ladder's summary, if there is one.

    ValueError otherwise: the new summary, which replaces it, would hold less.
    """
    if not summary.is_file():
        return
    try:
        points = json.loads(summary.read_text())["points"]
        there = {(point["rung"], point["seed"]) for point in points}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{summary} is no summary of a ladder ({error!r}): remove it") from error
    lost = sorted(there - {(trial.rung.name, trial.seed) for trial in trials})
    if lost:
        names = ", ".join(f"{rung} seed {seed}" for rung, seed in lost)
        raise ValueError(
            f"{summary} also holds {names}, which this command leaves out: name them in --ladder and --seeds too "
            "(finished runs are not trained again), or rename that file and its figures to keep them"
        )


def _check_training(training: Training, trial: Trial, is_needed: bool) -> None:
    path = training.folder / "run_config.json"
    if not path.is_file():
        if is_needed:
            raise ValueError(
                f"{trial.result} is there, but {path} is not: what it was trained with is unknown; "
                f"delete {trial.finetuning.folder} to train it anew"
            )
        return
    changes = differences(training, json.loads(path.read_text()), moves=trial.pretraining is not None)
    if changes:
        raise ValueError(
            f"{training.folder} holds a run with other options: {'; '.join(changes)}; "
            "use the same options, another --out_dir, or delete that folder"
        )
    checkpoint = checkpoint_in(training.folder)
    if checkpoint is not None:  # the data may have been built anew since
        state = read_run(checkpoint)
        run = with_data_version(training.run, version_of(state, checkpoint))
        manifest = dataclasses.asdict(read_run_manifest(run))
        check_resumable(state.run_config, manifest, state, training.folder)


def differences(training: Training, saved: dict[str, typing.Any], moves: bool = False) -> list[str]:
    """Lists options in which the run of a folder differs from the planned one, without OUTPUT_DIR.

    With `moves`, INIT_CHECKPOINT may differ, too: it is a folder of the ladder, which may have been moved as a whole.
    """
    ignored = {"output_dir", "init_checkpoint"} if moves else {"output_dir"}
    ignored |= {f"{part}.{name}" for part, name in left_to_data(training.run)}  # its folder has the numbers chosen
    if training.run.execution.matmul_dtype == "auto":
        ignored.add("execution.matmul_dtype")  # its folder has what the CPU could do
    runs = (run_config_from_dict(saved), training.run)
    if len({data_versions.root_of(run.data_dir) for run in runs}) == 1:  # whether the version fits is said elsewhere
        ignored.add("data_dir")
    there, here = (flattened(json.loads(json.dumps(dataclasses.asdict(run)))) for run in runs)
    return [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} now"
        for name in sorted(set(here) | set(there))
        if here.get(name) != there.get(name) and name not in ignored
    ]


def is_trained(training: Training) -> bool:
    """Whether the run has trained to its end."""
    checkpoint = checkpoint_in(training.folder)
    return checkpoint is not None and bool(read_run(checkpoint).progress["is_finished"])


def read_result(path: pathlib.Path) -> dict[str, dict[str, typing.Any]] | None:
    """Reads task -> metrics, without breakdowns; None if the file is missing or half-written."""
    try:
        result = json.loads(again(path, path.read_text))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(result, dict) or not result:
        return None
    for values in result.values():
        if isinstance(values, dict):
            values.pop(breakdown.KEY, None)
    return result


def run_trial(trial: Trial, say: collections.abc.Callable[[str], None], server: ForkServer | None = None) -> None:
    """Runs the commands whose results are missing, by `server` where it can. CalledProcessError, or Stopped."""
    name = f"{trial.rung.name}, seed {trial.seed}"
    if read_result(trial.result) is not None:
        say(f"{name}: finished, {trial.result}")
        return
    for training in filter(None, (trial.pretraining, trial.finetuning)):
        if is_trained(training):
            say(f"{name}: {training.run.stage} is finished, {training.folder}")
            continue
        execute(training.command, say=say, server=server)
        if not is_trained(training):
            raise Stopped(f"{training.folder} ended before its last step")
    execute(trial.scoring, say=say, server=server)
    if read_result(trial.result) is None:
        raise ValueError(f"{trial.result} is missing or broken after `python {' '.join(trial.scoring)}`")


def count_parameters(sizes: dict[str, int]) -> dict[str, int]:
    """Counts the parameters of a checkpoint from its map of tensor names to numbers of elements, without optimizers.

    dense_parameters has every weight outside tables: tower, norms, projections, ranking heads, segment embedding. Small
    tables that are kept with the dense part count as tables, because their rows belong to the data set.
    tower_parameters is the Transformer alone, the size that the paper gives (13 K for L1H32A4).
    """
    weights = {name: size for name, size in sizes.items() if is_weight(name)}
    tables = {name for name in weights if is_table(name)}
    return {
        "dense_parameters": sum(size for name, size in weights.items() if name not in tables),
        "table_parameters": sum(weights[name] for name in tables),
        "tower_parameters": sum(size for name, size in weights.items() if name.startswith(dense_weight(TOWER))),
    }


def parameters_of(folder: pathlib.Path) -> dict[str, int]:
    """Counts parameters of a trained run; keeps them in its folder, because its checkpoints may be deleted later."""
    path = folder / PARAMETERS_NAME
    if not path.is_file():
        from gpsd_dist.checkpoint import loading  # needs torch; the command that plans a ladder does not

        counts = count_parameters(loading.saved_sizes(manager.find(folder)))
        storage.write_json(path, counts)
    return json.loads(path.read_text())


def points_of(trial: Trial) -> list[dict[str, typing.Any]]:
    """Makes one row per task of a finished trial: rung, seed, parameters and every metric of `evaluate`."""
    head = {
        "rung": trial.rung.name,
        "seed": trial.seed,
        "embedding_dim": trial.finetuning.run.tables.embedding_dim,
        **parameters_of(trial.finetuning.folder),
    }
    return [{**head, "task": task, **metrics} for task, metrics in (read_result(trial.result) or {}).items()]


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file and its folder; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, content)
