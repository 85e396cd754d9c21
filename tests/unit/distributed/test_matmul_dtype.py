"""bf16 and `matmul_dtype` on GPUs, told by their properties alone."""

import dataclasses

import pytest
import torch

from gpsd_dist.distributed import matmul_dtype
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.scaling.ladder import Training
from gpsd_dist.scaling.runs import differences
from tests.integration.tiny_data import tiny_run

ON_CUDA = Runtime(0, 1, 0, torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(matmul_dtype, "all_sum", lambda tensor: tensor)


@pytest.mark.parametrize("asked", ["auto", "fp32", "bf16"])
def test_a_gpu_records_what_was_asked_so_that_the_same_command_goes_on(asked):
    run = tiny_run("pretrain", "x", "y", execution={"matmul_dtype": asked})
    settled = matmul_dtype.settle(run, None, ON_CUDA)
    assert settled == run
    assert not differences(Training(run, ()), dataclasses.asdict(settled))


def test_bf16_on_a_gpu_without_it_is_refused_on_all_ranks(monkeypatch):
    run = tiny_run("pretrain", "x", "y", train={"bf16": True})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"TrainConfig.bf16: a GPU of this run is older than Ampere"):
        matmul_dtype.settle(run, None, ON_CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert matmul_dtype.settle(run, None, ON_CUDA) == run
    monkeypatch.setattr(matmul_dtype, "all_sum", lambda tensor: tensor + 1)  # another rank's GPU is older
    with pytest.raises(ValueError, match=r"older than Ampere"):
        matmul_dtype.settle(run, None, ON_CUDA)
