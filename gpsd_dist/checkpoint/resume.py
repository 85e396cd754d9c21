"""Decides whether a run may go on from a checkpoint, or repeat a run on more data: only with its options and data."""

import dataclasses
import json
import logging
import math
import typing

from gpsd_dist.checkpoint import manager
from gpsd_dist.checkpoint.state import RunState, as_then, read_run
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import RunConfig, run_config_from_dict
from gpsd_dist.data import data_versions
from gpsd_dist.data.run_manifest import with_data_version

log = logging.getLogger(__name__)
_SAME_DATA = ("features", "tables", "tasks", "splits")
"""Parts of the manifest that a run depends on; paths, commands and times of building may differ."""
_OTHER_SPLITS = ("test", "holdout")  # Splits that a run never reads: a holdout may be added while it is paused


def check_resumable(
    run: dict[str, typing.Any], manifest: dict[str, typing.Any], state: RunState, checkpoint: Location
) -> None:
    """Raises ValueError if options or data differ that may not; the message lists them all.

    `run`, `manifest`: as plain dicts. An option that is younger than one of the two runs has its default there.
    """
    run, saved = (_plain(dataclasses.asdict(run_config_from_dict(part))) for part in (run, state.run_config))
    manifest = _plain(manifest)
    changed = list(_differences(RunConfig, run, saved))
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to a run with other options ({'; '.join(changed)}); "
            "use another OUTPUT_DIR, or the same options: --gin_file config.gin of that run's folder has them all"
        )
    parts = _other_data(manifest, state)
    if parts:
        raise ValueError(
            f"{checkpoint} was trained on other data: {'; '.join(parts)} differ from those of the data now (built "
            "anew, or another DATA_DIR); use the data of that run, or another OUTPUT_DIR"
        )


def in_data_version(run: RunConfig, start: Location | None) -> RunConfig:
    """Returns the run with the folder of one version of its data as `data_dir`. Collective.

    It is the version that the run goes on with: that of its own checkpoint `start`, or of the run it refits. Others
    begin with the current one. ValueError if the version is gone.
    """
    if start is None and not run.refit_of:
        return with_data_version(run)
    origin = start if start is not None else manager.find_together(run.refit_of)
    return with_data_version(run, version_of(read_run(origin), origin))


def version_of(state: RunState, checkpoint: Location) -> data_versions.Wanted:
    """Describes the version of its data set that a run began with, as its checkpoint says."""
    first = data_versions.name_of(state.run_config["data_dir"])
    return data_versions.Wanted(
        lambda manifest: not _other_data(_plain(dataclasses.asdict(manifest)), state),
        first,
        f"has the data that {checkpoint} was trained on (version {first})",
    )


def _other_data(manifest: dict[str, typing.Any], state: RunState) -> list[str]:
    """Names the parts of the manifest that differ from the checkpoint's, with their entries."""
    manifest = as_then(manifest, state.manifest)
    return [part for part in (_named_differences(part, manifest, state.manifest) for part in _SAME_DATA) if part]


def saved_numbers(run: RunConfig, start: Location | None) -> dict[str, typing.Any] | None:
    """Reads the options of the run that this one resumes (from its own checkpoint `start`) or refits; None: of neither.

    Collective if there is a process group.
    """
    if start is None and not run.refit_of:
        return None
    return read_run(start if start is not None else manager.find_together(run.refit_of)).run_config


def in_saved_revision(run: RunConfig, start: Location | None) -> RunConfig:
    """Takes over the revision of the model that the run goes on with, so that its weights compute what they did.

    It is that of its own checkpoint `start`, else of the tower it transfers, else of the run it refits. The heads of a
    warm start were built with or without `matches`, so it takes that over, too. Collective.
    """
    origin = run.init_checkpoint if run.transfers_tower else run.refit_of
    if start is None and not origin:
        return run
    checkpoint = start if start is not None else manager.find_together(origin)
    saved = read_run(checkpoint).run_config["model"]
    names = ("revision", *["matches", "bag_matches"] * run.finetune.warm_start)
    changed = {name: saved[name] for name in names if saved[name] != getattr(run.model, name)}
    if saved["name"] != run.model.name or not changed:
        return run
    log.warning("%s, that of %s", ", ".join(f"ModelConfig.{n} is {value}" for n, value in changed.items()), checkpoint)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changed))


def epochs_to_best(run: dict[str, typing.Any], manifest: dict[str, typing.Any]) -> float:
    """Returns how many epochs the run `refit_of` had trained when it was best on `valid`.

    `run`, `manifest`: those of the refit, as plain dicts. ValueError if that run is not finished, or had other options
    (but for the seed and what may change on resume) or other data. Collective if there is a process group.
    """
    checkpoint = manager.find_together(run["refit_of"])
    state = read_run(checkpoint)
    if not read_run(manager.find_together(run["refit_of"], "last")).progress["is_finished"]:
        raise ValueError(
            f"REFIT_OF={run['refit_of']!r} is not finished: its best step may change; let it run to its end"
        )
    if math.isnan(state.progress["best_value"]):
        raise ValueError(
            f"REFIT_OF={run['refit_of']!r} has no best validation: its metric was never a number (labels of one class "
            "in 'valid'); build the data with a longer valid period, or with --no_valid and train once"
        )
    alike = run | {name: state.run_config[name] for name in ("seed", "refit_of")}
    check_resumable(alike, manifest, state, checkpoint)
    return epochs_done(state)


def epochs_done(state: RunState) -> float:
    """Counts the passes over the data that a checkpoint has behind it, with fractions."""
    position, order, run = state.data_position, state.data_position["order"], state.run_config
    read = ("pretrain",) if run["stage"] == "pretrain" else ("train", "valid") if run.get("refit_of") else ("train",)
    stored = sum(split["num_history_tokens"] for split in state.manifest["splits"] if split["name"] in read)
    tokens = order.get("tokens", stored)  # tokens that the model saw; older checkpoints do not say
    total = tokens if order["batch_by"] == "tokens" else order["rows"]
    return float(position["epoch"] + position["step"] / -(-total // order["global_batch"]))


def _plain(raw: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Converts to what JSON keeps: lists instead of tuples."""
    return dict(json.loads(json.dumps(raw)))


def _named_differences(part: str, mine: dict[str, typing.Any], theirs: dict[str, typing.Any]) -> str:
    """Names the part of the manifest and its entries that differ; empty if none does."""
    here, there = ([entry for entry in raw[part] if entry["name"] not in _OTHER_SPLITS] for raw in (mine, theirs))
    names = sorted({entry["name"] for entry in (*here, *there) if entry not in here or entry not in there})
    return f"{part} {names}" if names else ""


def _differences(
    config: type, mine: dict[str, typing.Any], theirs: dict[str, typing.Any], prefix: str = ""
) -> typing.Iterator[str]:
    """Says of every option that differs, and that may not change on resume, what it is in both."""
    for field in dataclasses.fields(config):
        here, there = mine[field.name], theirs[field.name]
        if field.metadata.get("may_change_on_resume"):
            continue
        if dataclasses.is_dataclass(field.type):
            yield from _differences(typing.cast(type, field.type), here, there, f"{field.name}.")
        elif here != there:
            yield f"{prefix}{field.name}: {there!r} there, {here!r} now"
