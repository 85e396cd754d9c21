"""Finds the checkpoints of a run. `saving` writes them; this needs no torch.

    OUTPUT_DIR/checkpoints/step_00001000/   torch.distributed.checkpoint files of all ranks
                           .../index.json        which tensor lies where in them (`index`)
                           .../checksums.json    SHA-256 and size of each file (`integrity`)
                           .../run_state.json    step, data position, metrics, run config, manifest; written last
    OUTPUT_DIR/checkpoints/best.json        step and metrics of the best one (`retention`)

`TrainConfig.checkpoint_dir` puts `checkpoints` elsewhere, also behind an fsspec URL (`storage`). A folder without a
`step_` name or without `run_state.json` is a save that did not finish: it is never read.
"""

import logging
import os
import pathlib

from gpsd_dist.checkpoint import integrity, retention, storage
from gpsd_dist.checkpoint.retention import STATE_NAME, complete
from gpsd_dist.checkpoint.state import OtherVersion
from gpsd_dist.checkpoint.state import RunState as RunState
from gpsd_dist.checkpoint.state import read_state as read_state
from gpsd_dist.checkpoint.storage import Location, Remote, location
from gpsd_dist.config import TrainConfig
from gpsd_dist.distributed.main_rank import on_main

log = logging.getLogger(__name__)


def folder_of(output_dir: str | pathlib.Path, train: TrainConfig) -> Location:
    """Returns where a run with these options keeps its checkpoints."""
    return location(train.checkpoint_dir or output_dir) / retention.FOLDER_NAME


def best_step(folder: str | pathlib.Path | Remote) -> int:
    """Returns the step of the best checkpoint in `folder`, -1 if there is none."""
    place = retention.place_of(found) if (found := retention.best(location(folder))) else None
    return place[0] if place else -1


def find(path: "str | os.PathLike[str] | Remote", which: str = "best") -> Location:
    """Finds the "best" or "last" checkpoint of a run folder; a path to a checkpoint is itself the answer.

    If the best one is gone, a warning says so, and the next choice is the best that `best.json` knows, then the newest.
    ValueError if there is none.
    """
    path = location(path)
    if (path / STATE_NAME).is_file():
        return path
    folder = checkpoint_folder(path)
    chosen = retention.best(folder) if which == "best" else None
    done = [chosen] if chosen is not None else complete(folder)
    if not done:
        raise ValueError(
            f"{path} is neither a run folder with a finished checkpoint nor a checkpoint; has the run saved one?"
        )
    if which == "best" and (lost := retention.lost_best(folder)) is not None:
        log.warning("%s was the best checkpoint and is not there any more; taking %s", folder / lost, done[-1].name)
    return done[-1]


def find_together(path: "str | os.PathLike[str] | Remote", which: str = "best") -> Location:
    """Lets rank 0 `find` a checkpoint for all ranks; an error is raised on all. Collective if there is a process group.

    If each rank looked for itself while the other run goes on, ranks could load two different checkpoints.
    """
    return on_main(lambda: find(path, which))


def doubts(checkpoint: Location) -> list[str]:
    """Says why a checkpoint of a run may be no good start for another: the run still trains, or has a better one."""
    folder = checkpoint.parent
    done = complete(folder) if folder.name == retention.FOLDER_NAME else []
    if checkpoint not in done:
        return []  # a copy
    found = []
    best = retention.best(folder)
    if best not in (None, checkpoint):
        found.append(f"{checkpoint} is not the best checkpoint of its run, which is {best.name}")
    if read_state(done[-1]).progress.get("is_finished") is False:
        found.append(f"the run of {checkpoint} is not finished: its best checkpoint may become another one")
    return found


def checkpoint_folder(run: Location) -> Location:
    """Returns where a run keeps its checkpoints: in its folder, or where the options in its folder say."""
    config = run / "run_config.json"
    train = storage.read_json(config).get("train", {}) if config.is_file() else {}
    elsewhere = train.get("checkpoint_dir", "") if isinstance(train, dict) else None
    if not isinstance(elsewhere, str):
        raise ValueError(f"{config} does not hold the options of a run, so where its checkpoints are is not known")
    return (location(elsewhere) if elsewhere else run) / retention.FOLDER_NAME


def newest_intact(folder: Location) -> Location | None:
    """Finds the newest checkpoint whose files are what was written. Warns of later ones. Collective.

    None if there is no checkpoint at all. ValueError if there are some and all are damaged; OtherVersion if the newest
    intact one was written by a newer version.
    """
    # Shared file systems show new files to hosts at different times.
    names = on_main(lambda: [path.name for path in complete(folder)])
    damages = []
    for name in reversed(names):
        try:
            integrity.check(folder / name)
            read_state(folder / name)
            return folder / name
        except OtherVersion:
            raise  # it is whole: falling back would train its steps again
        except ValueError as error:
            damages.append(str(error))
            log.warning("%s; trying the checkpoint before it", error)
    if damages:
        raise ValueError(
            f"no checkpoint in {folder} is intact, so this run cannot go on: {'; '.join(damages)}. Restore one from a "
            "copy, or start anew in another OUTPUT_DIR"
        )
    return None
