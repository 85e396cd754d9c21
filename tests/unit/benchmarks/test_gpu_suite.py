"""The GPU benchmark at toy size on CPU: every part runs, one that fails does not lose the others."""

import json
import math

import pytest

from benchmarks import gpu_suite, run
from benchmarks.gpu_bench import TOY
from benchmarks.step_split import PHASES


@pytest.fixture
def names():
    """What takes no compiler."""
    return [name for name in gpu_suite.NAMES if "compile" not in name and "l24" not in name]


def test_every_part_measures_something(names, tmp_path, monkeypatch):
    def broken(bench, name):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_suite.PARTS, "attention", broken)
    status = gpu_suite.report(names, tmp_path / "gpu.json", TOY)
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "gpu.json").read_text())}
    assert status == 1 and list(entries) == names
    assert entries.pop("attention")["error"] == "RuntimeError: no such kernel"
    assert not {name: entry["traceback"] for name, entry in entries.items() if "error" in entry}
    assert entries["host_syncs"]["skipped"]
    plain = entries["train/l4h256a4"]
    assert plain["device_tokens_per_s"] > 0 and plain["tflops_per_s"] > 0 and plain["mfu"] is None
    assert set(plain["step_split_ms"]) == {"CPU", "wall"}  # on a GPU: {"GPU", "wall"}
    assert all(set(times) == set(PHASES) and times["backward"] > 0 for times in plain["step_split_ms"].values())
    assert "step_split_ms" not in entries["train/l4h256a4/sparse_dist"]
    assert all(
        entries[f"train/l4h256a4/{o}"]["loop_tokens_per_s"] > 0 for o in ("sparse_dist", "activation_checkpointing")
    )
    assert math.isfinite(entries["lookup"]["time_ratio"]) and entries["lookup"]["copy_gb_per_s"] > 0
    assert entries["hstu_kernel"]["history_kernel_error"] < 1e-6  # the same code on CPU


def test_attention_part_compares_two_implementations(tmp_path):
    assert gpu_suite.report(["attention"], tmp_path / "gpu.json", TOY) == 0
    [entry] = json.loads((tmp_path / "gpu.json").read_text())
    for key in ("k1", "k3"):
        assert entry[f"{key}_two_part_ms"] > 0 and entry[f"{key}_bucketed_ms"] > 0
        assert entry[f"{key}_two_part_error"] < 1e-5  # float32 on both sides


def test_goals_name_what_is_measured():
    assert set(gpu_suite.GOALS) <= set(gpu_suite.NAMES)


def test_without_a_gpu_the_command_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    assert run.main(["--suite", "gpu", "--out", str(tmp_path / "x.json")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
