"""Moves tensors from a checkpoint into the next run, mostly from pretraining into finetuning, and reports which.

The strategies are those of arXiv:2506.03699, section 3.3: ST moves tables, FT also the tower; SF then freezes tables.
"""

import dataclasses
import json
import logging
import typing

from gpsd_dist.checkpoint import growth, loading, manager
from gpsd_dist.checkpoint.state import read_run
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import ModelConfig, RunConfig
from gpsd_dist.config.model import MODELS
from gpsd_dist.distributed.main_rank import on_main
from gpsd_dist.parameter_names import BACKBONE, DENSE, IDS, TABLE, dense_weight, is_weight, small_table, table_weight
from gpsd_dist.schema import Manifest
from gpsd_dist.validation import AUTO

log = logging.getLogger(__name__)
_TOWER_OPTIONS = ("layers", "heads", "time_bias", "revision")
"""Options of ModelConfig that change what a tower computes but not the shapes of its weights, or not all of them."""
_AROUND_TOWER = {
    "finetune": (("model", "context_dim"), ("model", "number_buckets"), ("finetune", "offset")),
    "pretrain": (("pretrain", "item_bias"), ("pretrain", "recent_days")),
}
"""Options, by stage, that decide what there is beside the tower."""


def transfer(run: RunConfig, manifest: Manifest, own: loading.Tensors) -> str:
    """Loads the tensors that the strategy names, in place, and returns a report of them. Collective.

    `own`: `Components.weights()`. The id map of a managed table goes with its rows. A table whose vocabulary grew
    (`growth`) gets new rows below the loaded ones. ValueError if a vocabulary differs in another way, or a
    tensor is missing or has another shape: nothing is skipped silently.
    """
    weights, dense, is_whole = own[TABLE], own[DENSE], run.finetune.warm_start
    checkpoint = manager.find_together(run.init_checkpoint)
    for doubt in on_main(lambda: manager.doubts(checkpoint)):
        log.warning("%s", doubt)
    state = read_run(checkpoint)
    if is_whole and state.run_config["stage"] == "pretrain":
        raise ValueError(f"warm_start takes the heads over too, and {checkpoint} is a pretraining: leave it out")
    grown = _check_vocabularies(run, manifest, state, checkpoint)
    _check_width(run, state, checkpoint)
    _check_kept_alike(run, state, checkpoint, own)
    if run.transfers_tower:
        _check_tower(run, state, checkpoint)
    _warn_of_seen_validation(run, manifest, state, checkpoint)
    missing = [table for table in run.tables.transfer if table not in weights]
    if missing:
        raise ValueError(f"TRANSFER_TABLES names {missing}, but the sharded tables are {sorted(weights)}")
    tables = dict(weights) if is_whole else {name: weights[name] for name in run.tables.transfer}
    is_whole |= run.stage == state.run_config["stage"] == "pretrain"  # pretraining goes on with all of its dense part
    if is_whole and run.transfers_tower:
        _check_around_tower(run, manifest, state, checkpoint)
    moves = "" if is_whole else BACKBONE
    moved = {name: value for name, value in dense.items() if run.transfers_tower and name.startswith(moves)}
    maps = {name: state for name, state in own.get(IDS, {}).items() if name in tables}
    tensors = {TABLE: tables, DENSE: moved} | ({IDS: maps} if maps else {})
    loading.load_tensors(checkpoint, tensors, growth.keys(manifest, grown, tables, moved))
    lines = [f"  loaded ids.{name}, which id has which row; updates go on: {not run.freezes_tables}" for name in maps]
    lines += growth.start_new_rows(run, manifest, grown, tables, moved)
    return "\n".join([_report(run, checkpoint, state, tables, moved, dense), *lines])


def with_frozen_rows(run: RunConfig, manifest: Manifest, saved: dict[str, typing.Any] | None) -> RunConfig:
    """Puts the rows that INIT_CHECKPOINT has in each grown table in the place of TablesConfig.frozen_rows 'auto'.

    `saved`: options of the run that this one resumes or repeats, whose numbers are taken. Collective.
    """
    if run.tables.frozen_rows != AUTO:
        return run
    if saved is not None:
        rows = saved["tables"].get("frozen_rows", {})  # none in a run of before the option
    else:
        checkpoint = manager.find_together(run.init_checkpoint)
        grown = _check_vocabularies(run, manifest, read_run(checkpoint), checkpoint)
        rows = {name: num_old for name, num_old in grown.items() if name in run.tables.transfer}
        log.log(
            logging.INFO if rows else logging.WARNING, "rows that stay frozen: %s", rows or "all, no table has grown"
        )
    return dataclasses.replace(run, tables=dataclasses.replace(run.tables, frozen_rows=rows))


def _warn_of_seen_validation(run: RunConfig, manifest: Manifest, state: manager.RunState, checkpoint: Location) -> None:
    """Warns if the checkpoint was trained on `valid` too (a refit), and this run may validate on the same rows.

    Rows of a later time, as in the next day's build, are harmless.
    """
    valid = manifest.split("valid")
    if not state.run_config.get("refit_of") or run.refit_of or not valid.num_rows:
        return
    seen_to = [split["time_to_s"] for split in state.manifest["splits"] if split["name"] in ("train", "valid")]
    is_later = valid.time_from_s is not None and all(to is not None and to < valid.time_from_s for to in seen_to)
    if not is_later:
        log.warning(
            "%s was trained on train + valid (REFIT_OF=%s), so %s may validate on rows that its weights have seen: "
            "its best checkpoint and early stopping are not to be trusted; start from the run that was refitted, "
            "or refit this one, too (REFIT_OF)",
            checkpoint,
            state.run_config["refit_of"],
            run.output_dir,
        )


def _check_vocabularies(
    run: RunConfig, manifest: Manifest, state: manager.RunState, checkpoint: Location
) -> dict[str, int]:
    """Checks that row numbers mean the same ids there and here. Returns how many rows grown tables have there."""
    grown: dict[str, int] = {}
    ancestors = growth.ancestors(manifest)
    theirs = {table["name"]: table for table in state.manifest["tables"]}
    problems = []
    needed = {table.name for table in manifest.tables} if run.finetune.warm_start else set(run.tables.transfer)
    if run.transfers_tower:  # they include the small tables of token features
        needed |= {f.table for f in manifest.features_in("history") if f.table is not None}
    for name in sorted(needed):
        mine = manifest.table(name)
        if name not in theirs:
            problems.append(f"it has no table {name!r}")
        elif theirs[name]["fingerprint"] in ancestors.get(name, ()):
            grown[name] = theirs[name]["num_rows"]
        elif theirs[name]["fingerprint"] != mine.fingerprint:
            sizes = f"{theirs[name]['num_rows']} rows there, {mine.num_rows} here"
            problems.append(f"table {name!r} has another vocabulary ({sizes}): its row numbers mean other ids")
    if problems:
        raise ValueError(
            f"checkpoint {checkpoint} was trained on another data set: {'; '.join(problems)}; pretrain on this one"
        )
    return grown


def _check_width(run: RunConfig, state: manager.RunState, checkpoint: Location) -> None:
    """Checks that tables are equally wide. Shapes do not tell: rows of 50 and of 52 are both stored with 52 columns."""
    theirs, mine = state.run_config["tables"]["embedding_dim"], run.tables.embedding_dim
    if theirs != mine:
        raise ValueError(f"the tables of {checkpoint} are {theirs} wide, this run's {mine}: set EMBEDDING_DIM={theirs}")


def _check_kept_alike(run: RunConfig, state: manager.RunState, checkpoint: Location, own: loading.Tensors) -> None:
    """Checks that no table is sharded here and was kept with the dense part there, or the other way round."""
    saved = set(loading.saved_keys(checkpoint))
    small = {table["name"]: small_table(table["name"]) for table in state.manifest["tables"]}
    moved = list(own[TABLE]) if run.finetune.warm_start else run.tables.transfer
    grown = [name for name in moved if name in own[TABLE] and dense_weight(small.get(name, "")) in saved]
    needed = {*moved, *(small if run.transfers_tower else ())}
    shrunk = [name for name in small if name in needed and small[name] in own[DENSE] and table_weight(name) in saved]
    if grown or shrunk:
        theirs = state.run_config["tables"]["small_table_max_rows"]
        which = [f"{names} {how}" for names, how in ((grown, "small there"), (shrunk, "sharded there")) if names]
        raise ValueError(
            f"tables of {checkpoint} are kept in another way than here: {', '.join(which)}; set "
            f"TablesConfig.small_table_max_rows={theirs}, as it was there"
        )


def _check_tower(run: RunConfig, state: manager.RunState, checkpoint: Location) -> None:
    """Checks that the tower computes the same. Shapes do not tell: weights of 4 heads fit 2, and 4 layers contain 2."""
    theirs = state.run_config["model"]
    if theirs["name"] != run.model.name:
        raise ValueError(
            f"{run.strategy} copies the tower, but {checkpoint} is a {theirs['name']!r} and this run a "
            f"{run.model.name!r}; take the tables alone with STRATEGY ST or ST_SF"
        )
    traits = MODELS[run.model.name]
    read = [name for name in _TOWER_OPTIONS if name in traits.reads]
    if not traits.is_generative:  # by_width multiplies their tokens by sqrt(EMBEDDING_DIM); others only start by it
        read.append("parametrization")
    saved = {name: theirs.get(name, getattr(ModelConfig, name)) for name in read}
    different = [
        f"{name} {value} there, {getattr(run.model, name)} here"
        for name, value in saved.items()
        if value != getattr(run.model, name)
    ]
    if different:
        raise ValueError(
            f"{run.strategy} copies the tower, but that of {checkpoint} has other options: {', '.join(different)}; set "
            "them as they are there, or take the tables alone with STRATEGY ST or ST_SF"
        )


def _check_around_tower(run: RunConfig, manifest: Manifest, state: manager.RunState, checkpoint: Location) -> None:
    """Checks that the rest of the dense part is built alike. Shapes do not tell, of windows of days or of an offset."""
    theirs, mine = state.run_config, json.loads(json.dumps(dataclasses.asdict(run)))
    read = [(name, theirs[part][name], mine[part][name]) for part, name in _AROUND_TOWER[run.stage]]
    if run.finetune.offset:  # the logit of the first trained task has it
        weights = theirs["finetune"]["task_weights"], mine["finetune"]["task_weights"]
        there, here = (next(t.name for t in manifest.tasks if of.get(t.name, 1.0) > 0) for of in weights)
        read.append(("task of the offset", there, here))
    different = [f"{name} {there!r} there, {here!r} here" for name, there, here in read if there != here]
    if different:
        fix = "take the tables alone with STRATEGY ST or ST_SF" if run.stage == "pretrain" else "leave out warm_start"
        raise ValueError(
            f"all dense weights of {checkpoint} are taken over, but it has other options: {', '.join(different)}; set "
            f"them as they are there, or {fix}"
        )


def _report(
    run: RunConfig,
    checkpoint: Location,
    state: manager.RunState,
    tables: loading.Tensors,
    moved: loading.Tensors,
    dense: loading.Tensors,
) -> str:
    fates = {name: f"of which {num_rows:,} are frozen" for name, num_rows in run.tables.frozen_rows.items()}
    fates |= {name: f"frozen as {run.tables.frozen_dtype}" for name in run.frozen_tables if name not in fates}
    part = "dense part" if run.finetune.warm_start else "tower"
    kind = "pretraining" if state.run_config["stage"] == "pretrain" else "finetuning"
    lines = [f"{run.strategy} from {checkpoint} ({kind} step {state.step})"]
    for name, value in tables.items():
        lines.append(f"  loaded table.{name} {tuple(value.size())}, {fates.get(name, 'trained on')}")
    lines += [f"  loaded {len(moved)} tensors of the {part}, {sum(v.numel() for v in moved.values()):,} parameters"]
    fresh = [name for name in dense if name not in moved]
    lines += [f"  random {len(fresh)} dense tensors: {', '.join(sorted({n.split('.')[0] for n in fresh})) or 'none'}"]
    used = {*map(table_weight, tables), *map(dense_weight, moved)}
    maps = tuple(f"{IDS}.{name}." for name in tables)
    saved = [key for key in loading.saved_keys(checkpoint) if is_weight(key) or key.startswith(f"{IDS}.")]
    skipped = [key for key in saved if key not in used and not key.startswith(maps)]
    examples = ", ".join(skipped[:4]) + " ..." * (len(skipped) > 4)
    lines += [f"  not taken from the checkpoint: {len(skipped)} tensors ({examples})"]
    return "\n".join(lines)
