import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from gpsd_dist.distributed import runtime
from gpsd_dist.distributed.runtime import Runtime, seed_step


def _draw(seed: int, step: int, rank: int) -> float:
    seed_step(seed, step, rank)
    return float(torch.rand(()))


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2**20) for rank in (0, 1)]
    first = [_draw(*key) for key in keys]
    torch.rand(7)
    assert [_draw(*key) for key in reversed(keys)][::-1] == first
    assert len(set(first)) == len(keys)


def test_only_rank_0_is_main():
    assert [Runtime(rank, 2, rank, torch.device("cpu")).is_main for rank in (0, 1)] == [True, False]


@pytest.mark.parametrize(("ranks", "local_rank", "found"), [("4", 0, 4), ("4", 3, 4), (None, 2, 3)])
def test_more_ranks_than_visible_gpus_are_refused_on_every_rank(ranks, local_rank, found, monkeypatch):
    """A scheduler that shows each rank a GPU of its own: only rank 0 would find one, and wait for the rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    with pytest.raises(ValueError, match=f"{found} ranks on this machine, 1 visible GPUs .CUDA_VISIBLE_DEVICES: 5."):
        runtime._device(local_rank)


def test_a_rank_takes_the_gpu_of_its_number_and_float32_stays_float32(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert runtime._device(1) == torch.device("cuda", 1) and taken == [torch.device("cuda", 1)]
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("has_launcher", [True, False])
def test_nccl_is_told_its_device_where_ranks_meet(has_launcher, monkeypatch):
    """Then it connects at once, where an error is clear; alone, in a notebook, nothing connects."""
    called = {}
    monkeypatch.setattr(runtime, "_configure_logging", lambda rank: None)
    monkeypatch.setattr(runtime, "_device", lambda local_rank: torch.device("cuda", local_rank))
    monkeypatch.setattr(runtime, "_destroy_group", lambda: None)
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda backend, **given: called.update(given, b=backend))
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (ranks | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, value)
    if not has_launcher:
        monkeypatch.delenv("RANK")
    with runtime.process_group(timeout_s=10) as made:
        assert made.device == torch.device("cuda", 1)
    assert called["b"] == "cpu:gloo,cuda:nccl"
    assert called["device_id"] == (torch.device("cuda", 1) if has_launcher else None)


def test_a_group_of_one_can_be_made_again_after_a_mistake(monkeypatch):
    """In a notebook the process lives on."""
    monkeypatch.setattr(runtime, "_configure_logging", lambda rank: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    for _ in range(2):
        with pytest.raises(ValueError, match="tset"), runtime.process_group(30):
            raise ValueError("tset")
    assert not dist.is_initialized()


_LATE = """
import datetime, threading, time
import torch, torch.distributed as dist
from gpsd_dist.distributed.runtime import process_group

class Holder: ...

def main():
    with process_group(30):
        holder, store, groups = Holder(), dist.HashStore(), {}
        holder.itself, holder.groups = holder, groups  # a cycle, as in TorchRec

        def join(rank):
            groups[rank] = dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=30))

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        holder.work = groups[0].allreduce([torch.ones(3)])
        holder.future = holder.work.get_future().then(lambda _: time.sleep(1.0))  # in a thread of gloo
        groups[1].allreduce([torch.ones(3)])

main()
"""


def test_a_collective_that_ends_late_does_not_abort_the_process():
    """On a busy machine a gloo thread may still hold the last collective when everything else is done."""
    ended = subprocess.run([sys.executable, "-c", _LATE], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
