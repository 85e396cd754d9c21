"""`python -m tests.integration.crash_points FOLDER SCENARIO STORE`: kills a save at each of its file operations.

Every save runs in a forked process that kills itself (SIGKILL) just before its n-th operation, for n = 1, 2, ... until
one gets through. After each, this process reads what a reader would find, and lets a next save run. Prints a JSON list.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.implementations.local import LocalFileSystem

from gpsd_dist.checkpoint import files, integrity, manager, retention, saving, storage
from gpsd_dist.config import TrainConfig
from gpsd_dist.distributed.runtime import Runtime

_COUNTED_BYTES = 1000  # torch.save writes headers of a few bytes, too many to die in each
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


class Bucket(LocalFileSystem):
    """An object store on the disk: no rename that we may use, and a small file is put whole or not at all."""

    protocol = ("bucket",)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        path = self._strip_protocol(path)
        aside = f"{path}.upload"
        pathlib.Path(aside).write_bytes(value)
        os.replace(aside, path)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("bucket://"))


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is saved before, (step, best step, value) each, and what is being saved when the process dies."""

    before: tuple[tuple[int, int, float], ...]
    saved: tuple[int, int, float]
    keep_last: int


SCENARIOS = {
    "new_best": Scenario(((2, 2, 2.0),), (4, 4, 4.0), keep_last=1),
    "not_the_best": Scenario(((2, 2, 2.0), (4, 2, 4.0)), (6, 2, 6.0), keep_last=1),
    "same_step_again": Scenario(((2, 2, 2.0), (4, 4, 4.0)), (4, 4, 4.5), keep_last=2),
    "first": Scenario((), (2, 2, 2.0), keep_last=1),
}
NEXT = (8, 8, 8.0)


def save(place, keep_last: int, step: int, best_step: int, value: float, is_async: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train = TrainConfig(keep_last=keep_last, async_checkpoints=is_async)
    state = manager.RunState(step, {}, {"best_step": best_step}, {"click/auc": value}, {}, {}, 1)
    with saving.Checkpoints(place, Runtime(0, 1, 0, torch.device("cpu")), train) as checkpoints:
        checkpoints.save(
            {"table": {"item": torch.full((700, 8), value)}, "dense": {"w": torch.full((3,), value)}}, state
        )


def die_at(point: int, folder: str, log: str) -> None:
    """From now on, this process kills itself before its `point`-th change of a file below `folder`."""
    count = 0

    def step(operation: str, before_death=None) -> None:
        nonlocal count
        count += 1
        if count == point:
            if before_death is not None:
                before_death()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, operation.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if count >= point or not arguments:
            return
        is_below = str(arguments[0]).startswith(folder)
        is_in_tree = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # shutil.rmtree names files in a folder
        if event in _CHANGES and (is_below or is_in_tree):
            step(f"{event} {pathlib.Path(str(arguments[0])).name}")
        elif event == "open" and is_below and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            step(f"open {pathlib.Path(str(arguments[0])).name}")

    original = files._HashedStream.write

    def write(stream, content):
        def half():
            stream._stream.write(memoryview(content).cast("B")[: memoryview(content).nbytes // 2])
            stream._stream.flush()

        if memoryview(content).nbytes >= _COUNTED_BYTES:
            step("write of half a buffer", half)
        return original(stream, content)

    fsync = os.fsync

    def counted_fsync(descriptor):
        step("fsync")
        fsync(descriptor)

    files._HashedStream.write = write
    os.fsync = counted_fsync
    sys.addaudithook(hook)


def in_child(work) -> int:
    """Exit status of a forked process that runs `work`; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def value_of(checkpoint) -> float:
    """The one value in all tensors of a checkpoint, whose files are verified before."""
    integrity.check(checkpoint)
    tensors = {"table": {"item": torch.zeros(700, 8)}, "dense": {"w": torch.zeros(3)}}
    dcp.load(tensors, storage_reader=files.Reader(checkpoint), no_dist=True)
    values = {float(value) for part in tensors.values() for tensor in part.values() for value in tensor.unique()}
    assert len(values) == 1, values
    assert manager.read_state(checkpoint).metrics == {"click/auc": next(iter(values))}
    return values.pop()


def found(place) -> dict:
    """What a reader finds: step and value of the newest and of the best checkpoint, and what best.json names."""
    folder = storage.location(place) / "checkpoints"
    best_file = folder / retention.BEST_NAME
    named = storage.read_json(best_file)["step"] if best_file.is_file() else None
    done = retention.complete(folder)
    if not done:
        return {"latest": None, "best": None, "named": named, "steps": [], "names": []}
    return {
        "latest": value_of(manager.find(place, "last")),
        "best": value_of(manager.find(place)),
        "named": named,
        "steps": [retention.place_of(path)[0] for path in done],
        "names": sorted(path.name for path in folder.iterdir()),
    }


def main(root: str, scenario_name: str, store: str) -> None:
    fsspec.register_implementation("bucket", Bucket)
    scenario, results = SCENARIOS[scenario_name], []
    prefix = "" if store == "disk" else "bucket://"
    prepared = pathlib.Path(root) / "prepared"
    prepared.mkdir(parents=True)
    for arguments in scenario.before:
        assert in_child(lambda a=arguments: save(f"{prefix}{prepared}", 9, *a, is_async=False)) == 0
    for point in range(1, 400):
        folder, log = pathlib.Path(root) / f"at_{point}", f"{root}/operation"
        shutil.copytree(prepared, folder)
        place = f"{prefix}{folder}"

        def killed_save(place=place, folder=folder, point=point):
            die_at(point, str(folder), f"{root}/operation")
            save(place, scenario.keep_last, *scenario.saved, is_async=point % 2 == 0)

        status = in_child(killed_save)
        after_crash = found(place)
        next_status = in_child(lambda place=place: save(place, scenario.keep_last, *NEXT, is_async=True))
        results.append(
            {
                "operation": pathlib.Path(log).read_text() if status else "none",
                "status": status,
                "after_crash": after_crash,
                "next_status": next_status,
                "after_next": found(place),
            }
        )
        shutil.rmtree(folder)
        if status == 0:
            break
    print(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
