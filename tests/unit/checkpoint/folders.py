"""Hand-made folders of checkpoints: real names, states and checksums around files of a few bytes."""

import dataclasses
import json
import math

from gpsd_dist.checkpoint import integrity, manager, retention

STATE = manager.RunState(
    step=3,
    data_position={"epoch": 0, "step": 3},
    progress={"best_value": -math.inf},
    metrics={"click/auc": 0.5},
    run_config={},
    manifest={},
    world_size=1,
    has_checksums=True,
)
DATA = {"__0_0.distcp": b"numbers of rank 0", "__1_0.distcp": b"numbers of rank 1", ".metadata": b"index"}


def add(output_dir, step: int, *, is_complete=True, best_step=None, time_s=0.0, attempt=0, has_checksums=True, **state):
    """One checkpoint in OUTPUT_DIR/checkpoints; returns its folder."""
    folder = manager.location(output_dir) / "checkpoints" / retention.folder_name(step, attempt)
    folder.mkdir(parents=True)
    progress = STATE.progress | ({} if best_step is None else {"best_step": best_step})
    state = dataclasses.replace(STATE, step=step, progress=progress, has_checksums=has_checksums, **state)
    content = json.dumps(dataclasses.asdict(state)).encode()
    files = DATA | ({retention.STATE_NAME: content} if is_complete else {})
    sums = {name: integrity.sum_of(value) for name, value in (DATA | {retention.STATE_NAME: content}).items()}
    if has_checksums:
        files = files | {integrity.CHECKSUMS_NAME: integrity.Checksums(time_s, sums).to_json()}
    for name, value in files.items():
        (folder / name).write_bytes(value)
    return folder


def mark_best(output_dir, step: int) -> None:
    content = json.dumps({"step": step, "metrics": {}}).encode()
    (manager.location(output_dir) / "checkpoints" / "best.json").write_bytes(content)


def names(output_dir) -> list[str]:
    """Checkpoint folders that are there."""
    return [path.name for path in retention.step_folders(manager.location(output_dir) / "checkpoints")]
