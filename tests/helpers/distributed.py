"""Run a function on N gloo ranks of this machine, as a test. Not a launcher: no restarts, no GPUs."""

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pathlib
import pickle
import tempfile
import time
import traceback
import typing

import torch
import torch.distributed as dist

_GRACE_S = 5.0  # after one rank failed, its peers have this long to fail by themselves
_RANK_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run_distributed(
    func: typing.Callable, world_size: int, tmp_path: pathlib.Path, *args, timeout_s: float = 60.0
) -> list[typing.Any]:
    """Calls `func(rank, world_size, *args)` in `world_size` spawned processes of one gloo group, one thread each.

    `func` must be importable (module level), `args` and its result must pickle. Returns the results in rank order. The
    first rank that raised is re-raised as RuntimeError with its rank and traceback; whoever runs longer than
    `timeout_s` is killed and reported as TimeoutError with the stack of every stuck rank. Ranks meet through a file in
    `tmp_path`, not through a port.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ranks_", dir=tmp_path))
    kill_time_s = time.time() + timeout_s
    context = multiprocessing.get_context("spawn")
    with _environment(_RANK_ENV):
        ranks = [
            context.Process(target=_run_rank, args=(func, rank, world_size, folder, kill_time_s, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
    try:
        _wait(ranks, folder, timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(func, rank: int, world_size: int, folder: pathlib.Path, kill_time_s: float, args: tuple) -> None:
    """Body of one rank: leaves `result_<rank>` or `error_<rank>` in `folder`, and its stacks before it is killed."""
    torch.set_num_threads(1)
    left_s = kill_time_s - time.time()  # the import of torch above took a part of the time
    with open(folder / f"stack_{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(max(left_s - 1.0, 0.1), file=stacks)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder / 'store'}",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(
                    seconds=max(2 * left_s, 10.0)
                ),  # the parent, not gloo, decides when it is too long
            )
            result = pickle.dumps(func(rank, world_size, *args))
            _write(folder / f"result_{rank}", result)
        except BaseException:
            _write(folder / f"error_{rank}", traceback.format_exc().encode())
            os._exit(1)  # no destroy_process_group: peers may sit in a collective
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def _wait(ranks: list, folder: pathlib.Path, timeout_s: float) -> None:
    """Returns when all ranks ended well; raises for the first that did not."""
    deadline = time.monotonic() + timeout_s
    failed = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not failed and any(process.exitcode not in (None, 0) for process in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)
    errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RuntimeError(f"rank {errors[0].name.removeprefix('error_')} failed:\n{errors[0].read_text()}")
    dead = [(rank, process.exitcode) for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
    if dead:
        raise RuntimeError(f"ranks ended without a Python error, (rank, exit code): {dead}")
    stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    if stuck:
        files = {rank: folder / f"stack_{rank}" for rank in stuck}
        stacks = "\n".join(f"rank {r}:\n{f.read_text() if f.exists() else 'not started'}" for r, f in files.items())
        raise TimeoutError(f"ranks {stuck} still ran after {timeout_s} s\n{stacks}")


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes by rename, so that the parent never reads half of it."""
    aside = path.with_name(f"part_{path.name}")
    aside.write_bytes(content)
    aside.replace(path)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> typing.Iterator[None]:
    """Environment variables for the processes started inside the block; the old values come back after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
