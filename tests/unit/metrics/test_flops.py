"""FLOPs of a step by hand, and the utilisation of a device that is known by its name."""

import json
import math

import pytest
import torch

from gpsd_dist.config import ModelConfig
from gpsd_dist.metrics.flops import StepFlops, Work, layer_weights, peak_bf16_flops, step_flops
from gpsd_dist.metrics.progress_bar import ProgressBar
from gpsd_dist.metrics.recorder import Recorder
from gpsd_dist.metrics.throughput import Throughput
from gpsd_dist.model.transformer import ffn_width
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import tiny_run


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("CPU", None),
    ],
)
def test_peak_is_found_by_name(name, peak):
    assert peak_bf16_flops(name) == peak


def test_layers_of_width_256_by_hand():
    # L4H256: F = 704, P = 4 * 256^2 + 3 * 256 * 704 = 802,816
    assert ffn_width(256) == 704
    assert sum(layer_weights(ModelConfig(width=256, heads=4))[:2]) == 802_816
    assert layer_weights(ModelConfig(name="hstu", width=50, heads=2, head_width=25)) == (4 * 2500, 2500, 50)
    assert layer_weights(ModelConfig(name="sasrec", width=8, heads=2, ffn_width=16)) == (192, 64 + 256, 8)
    assert layer_weights(ModelConfig(name="din")) is None


def test_a_step_by_hand():
    """A token of a layer costs 6 FLOPs a weight, a pair 12 a channel; the last layer's histories stop at keys."""
    run = tiny_run("finetune", "x", "y", model={"layers": 2, "width": 16, "heads": 2})
    before, behind = 3 * 256, 256 + 3 * 16 * ffn_width(16)
    found = step_flops(run, Work(10, 30, 4, 20), head_weights=7, auxiliary_rows=0)
    pairs = 12 * 16 * (2 * (30 + 20) - 30)
    assert found == 6 * (2 * (before + behind) * 14 - behind * 10) + pairs + 6 * 7 * 4
    pretraining = tiny_run("pretrain", "x", "y", model={"layers": 2, "width": 16, "heads": 2})
    found = step_flops(pretraining, Work(10, 30, 0, 0, positions=8), 0, auxiliary_rows=5)
    assert found == 12 * (before + behind) * 10 + 2 * 12 * 16 * 30 + 6 * 16 * 8 * (16 + 5)
    assert step_flops(tiny_run("third", "x", "y"), Work(1, 1, 1, 1), 0, 0) is None


def test_mfu_is_work_over_time_and_peak():
    now = [0.0]
    speed = Throughput(clock=lambda: now[0], peak_flops_per_s=1e13)
    now[0] = 2.0
    speed.step(1, 1, 4e12)
    assert speed.rates()["perf/mfu"] == pytest.approx(0.2) and speed.rates()["perf/tflops_per_s"] == pytest.approx(2)
    unknown = Throughput(clock=lambda: now[0])
    unknown.step(1, 1, 4e12)
    assert "perf/mfu" not in unknown.rates()  # a CPU


def _logged(rank, world_size, folder):
    speed = Throughput(peak_flops_per_s=(1e15, math.nan)[rank])
    speed.step(1, 1, 4e12)
    recorder = Recorder(folder, rank)
    speed.record_to(recorder)
    return recorder.log(1, 0.0)["perf/mfu"]


def test_ranks_whose_gpu_is_not_listed_record_the_names_of_the_others(tmp_path):
    """It was RuntimeError at the first log step: "ranks [1] recorded other metrics than rank 0"."""
    assert all(math.isnan(mfu) for mfu in run_distributed(_logged, 2, tmp_path, tmp_path / "run"))
    [entry] = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(entry)["perf/mfu"] is None
    bar = ProgressBar(10)
    bar.show(1, {"perf/mfu": math.nan})
    assert "MFU" not in bar._text()


def test_a_gpu_that_is_not_listed_has_a_peak_that_is_not_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GB300")
    run, model = tiny_run("finetune", "x", "y"), torch.nn.Linear(1, 1)
    assert math.isnan(StepFlops(run, model, torch.device("cuda")).peak)
    assert StepFlops(run, model, torch.device("cpu")).peak is None
