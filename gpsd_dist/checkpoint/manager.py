"""Saves and finds the checkpoints of one run. They are written in the background and committed at one moment.

    OUTPUT_DIR/checkpoints/step_00001000/   torch.distributed.checkpoint files of all ranks
                           .../index.json        which tensor lies where in them (`index`)
                           .../checksums.json    SHA-256 and size of each file (`integrity`)
                           .../run_state.json    step, data position, metrics, run config, manifest; written last
    OUTPUT_DIR/checkpoints/best.json        step and metrics of the best one (`retention`)

`TrainConfig.checkpoint_dir` puts `checkpoints` elsewhere, also behind an fsspec URL (`storage`). A folder without a
`step_` name or without `run_state.json` is a save that did not finish: it is never read.
"""

import collections.abc
import concurrent.futures
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import threading
import time

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from gpsd_dist.checkpoint import files, integrity, retention, storage
from gpsd_dist.checkpoint.integrity import FileSum
from gpsd_dist.checkpoint.loading import Tensors
from gpsd_dist.checkpoint.retention import STATE_NAME, complete
from gpsd_dist.checkpoint.state import OtherVersion
from gpsd_dist.checkpoint.state import RunState as RunState
from gpsd_dist.checkpoint.state import read_state as read_state
from gpsd_dist.checkpoint.storage import Location, Remote, location
from gpsd_dist.config import TrainConfig
from gpsd_dist.disk import writing
from gpsd_dist.distributed.collectives import FailedOnMain, described, on_main
from gpsd_dist.distributed.runtime import Runtime

log = logging.getLogger(__name__)
_LONGEST_WAIT_S = 4 * 3600  # of ranks for the slowest one; untuned


class Checkpoints:
    """Saves and prunes the checkpoints of one run. At most one save is under way.

    Use as a context: leaving it waits for the save under way, also after an error.
    """

    def __init__(self, output_dir: str | pathlib.Path, runtime: Runtime, train: TrainConfig):
        self.folder = folder_of(output_dir, train)
        self.before_commit: collections.abc.Callable[[], None] = lambda: None
        """Brings to disk what a checkpoint refers to, such as metrics; called on rank 0, in the thread that writes."""
        self.stall_s = 0.0  # How long the last `save` kept its caller, in seconds
        self._runtime, self._train = runtime, train
        self._group: dist.ProcessGroup | None = None
        self._copies: Tensors | None = None
        self._writing: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif (error := self._settle()) is not None:  # logged: the exception that ended the run goes on
            log.error("%s", error)

    def save(self, tensors: Tensors, state: RunState) -> None:
        """Waits for the save before, copies the tensors and returns; a thread writes the copy. Collective.

        OSError on all ranks if the save before failed; it names rank and path. Without `async_checkpoints` everything
        is on disk on return. `state.progress["best_step"]` names the best checkpoint.
        """
        start_s = time.perf_counter()
        self.wait()
        if self._group is None:  # a group of its own: the thread's collectives must not mix with those of training
            # A rank whose disk is slow may be waited for; a rank that is dead closes its connection.
            timeout = datetime.timedelta(seconds=max(self._train.collective_timeout_s, _LONGEST_WAIT_S))
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        content = json.dumps(dataclasses.asdict(state) | {"has_checksums": True}, indent=1).encode()
        if self._train.async_checkpoints:
            self._copies = files.staged(tensors, self._copies)
            self._writing = _in_thread(lambda: self._write(self._copies, state.step, content, start_s))
        else:
            with self._runtime.watchdog.waiting():
                self._write(tensors, state.step, content, start_s)
        self.stall_s = time.perf_counter() - start_s

    def wait(self) -> None:
        """Waits until the save under way is on disk. OSError on all ranks if it failed."""
        if (error := self._settle()) is not None:
            raise error

    def _settle(self) -> BaseException | None:
        writing, self._writing = self._writing, None
        with self._runtime.watchdog.waiting():
            return writing.exception() if writing is not None else None

    def latest(self) -> Location | None:
        """Waits for the save under way, then returns the newest complete checkpoint."""
        if self._writing is not None:
            concurrent.futures.wait([self._writing])
        done = complete(self.folder)
        return done[-1] if done else None

    def best(self) -> Location | None:
        """Returns the best checkpoint that is there."""
        return retention.best(self.folder)

    def go_back_to(self, checkpoint: Location) -> None:
        """Sets later checkpoints aside. They are damaged, because a run starts from the newest intact one."""
        if not self._runtime.is_main:
            return
        done = complete(self.folder)
        for later in done[done.index(checkpoint) + 1 :]:
            (later / STATE_NAME).rename(later / retention.DAMAGED_NAME)  # type: ignore[arg-type]
            log.warning("%s is damaged and set aside: %s in it says so", later, retention.DAMAGED_NAME)
        retention.write_best(self.folder)

    def _write(self, tensors: Tensors | None, step: int, content: bytes, start_s: float) -> None:
        """Writes and commits one checkpoint. Collective on the group of this object."""
        assert tensors is not None
        waited_s = time.perf_counter() - start_s
        target = self.folder / retention.folder_name(step)
        try:
            name = on_main(lambda: self._prepare(step), self._group)
            writer = files.Writer(self.folder / name, self._runtime.watchdog)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            written: list[dict[str, FileSum]] = [{}] * self._runtime.world_size
            dist.all_gather_object(written, writer.written, group=self._group)
            on_main(lambda: self._commit(self.folder / name, integrity.merged(written), content), self._group)
        except CheckpointException as error:
            raise OSError(f"{target} was not written: {files.first_failure(error)}") from error
        except (OSError, FailedOnMain) as error:
            raise OSError(f"{target} was not written: rank 0: {error}") from error
        except Exception as error:  # for example: another rank is gone
            raise OSError(f"{target} was not written: rank {self._runtime.rank}: {described(error)}") from error
        megabytes = sum(entry.num_bytes for part in written for entry in part.values()) / 1e6
        taken_s = time.perf_counter() - start_s
        waited_s = waited_s if self._train.async_checkpoints else taken_s
        log.info("checkpoint %s: %.1f MB in %.2f s, training waited %.3f s", target, megabytes, taken_s, waited_s)

    def _prepare(self, step: int) -> str:
        """Deletes what crashes left of this step. Returns the name of the folder to write into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.folder, pathlib.Path):
            writing.sync(self.folder.parent)  # its name is new with the first save
            writing.remove_leftovers(self.folder)
            for leftover in self.folder.glob(".step_*.partial"):
                storage.delete(leftover, STATE_NAME)
        attempt = 0
        while ((target := self.folder / retention.folder_name(step, attempt)) / STATE_NAME).is_file():
            attempt += 1
        if target.is_dir():
            storage.delete(target, STATE_NAME)
        return target.name if isinstance(target, Remote) else f".{target.name}.partial"

    def _commit(self, folder: Location, written: dict[str, FileSum], content: bytes) -> None:
        """Makes the checkpoint visible to readers; then updates `best.json` and deletes old checkpoints."""
        sums = integrity.Checksums(time.time(), written | {STATE_NAME: integrity.sum_of(content)})
        self.before_commit()
        storage.write(folder / integrity.CHECKSUMS_NAME, sums.to_json())
        storage.write(folder / STATE_NAME, content)
        if isinstance(folder, pathlib.Path):
            folder.rename(folder.with_name(folder.name[1:].removesuffix(".partial")))
            writing.sync(folder.parent)
        retention.write_best(self.folder)
        for old in retention.removable(self.folder, self._train.keep_last, self._train.keep_every_hours):
            try:
                storage.delete(old, STATE_NAME)
            except OSError as error:  # the new one is safe, so training goes on
                log.warning("the old checkpoint %s could not be deleted: %s", old, error)


def _in_thread(work: collections.abc.Callable[[], None]) -> concurrent.futures.Future[None]:
    """Runs `work` in a daemon thread, which does not keep the process alive after a failure elsewhere."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            log.error("%s", error)  # now; training hears of it only at its next save
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


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
