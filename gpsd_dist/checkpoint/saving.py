"""Saves the checkpoints of one run: written in the background and committed at one moment. `manager` finds them."""

import collections.abc
import concurrent.futures
import dataclasses
import datetime
import json
import logging
import pathlib
import threading
import time

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from gpsd_dist.checkpoint import files, integrity, retention, storage
from gpsd_dist.checkpoint.integrity import FileSum
from gpsd_dist.checkpoint.loading import Tensors
from gpsd_dist.checkpoint.manager import folder_of
from gpsd_dist.checkpoint.retention import STATE_NAME, complete
from gpsd_dist.checkpoint.state import RunState
from gpsd_dist.checkpoint.storage import Location, Remote
from gpsd_dist.config import TrainConfig
from gpsd_dist.disk import writing
from gpsd_dist.distributed.main_rank import FailedOnMain, described, on_main
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
        self._staging = files.Staging()
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
            copies = self._staging.copy(tensors)
            self._writing = _in_thread(lambda: self._write(copies, state.step, content, start_s))
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

    def _write(self, tensors: Tensors, step: int, content: bytes, start_s: float) -> None:
        """Writes and commits one checkpoint. Collective on the group of this object."""
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
