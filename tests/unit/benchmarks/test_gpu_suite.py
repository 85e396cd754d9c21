"""The GPU benchmark at toy size on CPU: every part runs, one that dies does not lose the others."""

import json
import math
import pathlib
import pkgutil
import subprocess
import sys

import pytest

from benchmarks import gpu_part, gpu_suite, run
from benchmarks.gpu_bench import SIZES, TRAINED
from benchmarks.step_split import PHASES
from gpsd_dist.distributed.runtime import process_group
from tests.helpers import forked

ROOT = pathlib.Path(__file__).parents[3]
NOT_THERE = ("ibis", "duckdb", "lightgbm", "pyspark")
WITHOUT_KERNELS = (*NOT_THERE, "torchrec", "fbgemm_gpu", "tensordict")


def run_without(modules, code, *arguments):
    """Runs Python code where `modules` cannot be imported; -> (exit status, all output)."""
    words = ["tests.helpers.without", ",".join(modules), code, *arguments]
    if "torchrec" not in modules:
        done = forked.run(*words)
        return done.returncode, done.stdout + done.stderr
    command = [sys.executable, "-m", *words]  # a fork has it
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout


def measured(name):
    """Figures of a part, measured in this process."""
    with process_group(timeout_s=600) as runtime:
        return gpu_part.measure(gpu_suite.PARTS[name.split("/")[0]], name, SIZES["toy"], runtime)


def test_training_is_measured():
    plain = measured("train/l4h256a4")
    assert plain["device_tokens_per_s"] > 0 and plain["tflops_per_s"] > 0 and plain["mfu"] is None
    assert set(plain["step_split_ms"]) == {"CPU", "wall"}  # on a GPU: {"GPU", "wall"}
    assert all(set(times) == set(PHASES) and times["backward"] > 0 for times in plain["step_split_ms"].values())
    for option in ("sparse_dist", "activation_checkpointing"):
        found = measured(f"train/l4h256a4/{option}")
        assert found["loop_tokens_per_s"] > 0 and ("step_split_ms" in found) == (option != "sparse_dist")
    assert plain["planned_peak_gib"] > 0


@pytest.mark.parametrize("option", ["ranking", "frozen", "hstu", "sasrec", "cuda_graphs", "profile"])
def test_other_runs_are_measured(option):
    found = measured(f"train/l4h256a4/{option}")
    assert found["device_tokens_per_s"] > 0 and found["planned_peak_gib"] > 0 and found["tflops_per_s"] > 0
    assert ("profile" in found) == (option == "profile")


def test_lookup_and_kernels_are_measured():
    lookup = measured("lookup")
    assert math.isfinite(lookup["time_ratio"]) and lookup["copy_gb_per_s"] > 0
    assert measured("hstu_kernel")["history_kernel_error"] < 1e-6  # the same code on CPU
    assert measured("host_syncs")["skipped"]


def test_attention_part_compares_two_implementations(tmp_path):
    assert gpu_suite.report(["attention"], tmp_path / "gpu.json", "toy") == 0
    [entry] = json.loads((tmp_path / "gpu.json").read_text())
    assert entry["name"] == "attention" and entry["device"] and entry["torch"]
    for key in ("k1", "k3"):
        assert entry[f"{key}_two_part_ms"] > 0 and entry[f"{key}_bucketed_ms"] > 0
        assert entry[f"{key}_two_part_error"] < 1e-5  # float32 on both sides


def test_a_part_that_dies_is_recorded_and_the_rest_go_on(tmp_path, monkeypatch, capsys):
    fakes = {"lookup": "aborts", "host_syncs": "raises", "attention": "works"}
    for part, fake in fakes.items():
        monkeypatch.setitem(gpu_suite.PARTS, part, f"tests.helpers.gpu_parts:{fake}")
    out, written = tmp_path / "new" / "gpu.json", []
    run_part = gpu_suite.run_part

    def noting(name, sizes):
        written.append([entry["name"] for entry in json.loads(out.read_text())] if out.exists() else [])
        return run_part(name, sizes)

    monkeypatch.setattr(gpu_suite, "run_part", noting)
    assert gpu_suite.report(list(fakes), out, "toy") == 1
    assert written == [[], ["lookup"], ["lookup", "host_syncs"]]  # in the file when the next part begins
    aborted, raised, worked = json.loads(out.read_text())
    assert aborted["name"] == "lookup" and aborted["error"] == "signal SIGABRT"
    assert "CUDA error: an illegal memory access was encountered" in aborted["stderr"]
    assert raised["error"] == "exit status 1" and raised["stderr"][-1].endswith("RuntimeError: no such kernel")
    assert worked["tokens"] == SIZES["toy"].tokens_per_step and "error" not in worked
    shown = capsys.readouterr().out
    assert "no such kernel" in shown and "SIGABRT" in shown


def test_a_part_that_hangs_is_killed_and_recorded(monkeypatch):
    monkeypatch.setitem(gpu_suite.PARTS, "lookup", "tests.helpers.gpu_parts:hangs")
    monkeypatch.setattr(gpu_suite, "PART_TIMEOUT_S", 0.5)
    assert gpu_suite.run_part("lookup", "toy")["error"] == "killed after 0.5 s"


def test_parts_with_goals_come_first_and_what_compiles_last():
    assert len(set(gpu_suite.NAMES)) == len(gpu_suite.NAMES) == 18
    assert set(gpu_suite.NAMES[: len(gpu_suite.GOALS)]) == set(gpu_suite.GOALS)
    assert {name.split("/")[0] for name in gpu_suite.NAMES} == set(gpu_suite.PARTS)
    assert {name.split("/")[1] for name in gpu_suite.NAMES if name.startswith("train/")} == set(TRAINED)
    is_compiled = [name.endswith(("/compile", "/cuda_graphs")) for name in gpu_suite.NAMES]
    assert is_compiled == sorted(is_compiled) and sum(is_compiled) == 3


def test_without_a_gpu_the_command_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    assert run.main(["--suite", "gpu", "--out", str(tmp_path / "x.json")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
    assert run.main(["--suite", "gpu", "--names", "lookup,looking"]) == 2
    assert "--names ['looking'] are not parts of the GPU suite" in capsys.readouterr().out


def test_the_command_starts_without_the_libraries_of_other_suites():
    command = "import runpy; runpy.run_module('benchmarks.run', run_name='__main__')"
    status, output = run_without(NOT_THERE, command, "--help")
    assert status == 0 and "--suite {cpu,ablation,frozen,growth,loader,gpu}" in output, output
    status, output = run_without(WITHOUT_KERNELS, command, "--suite", "gpu", "--names", "looking")
    assert status == 2 and "are not parts of the GPU suite" in output, output


@pytest.mark.parametrize(
    ("modules", "parts"), [(NOT_THERE, tuple(gpu_suite.PARTS)), (WITHOUT_KERNELS, ("attention", "hstu_kernel"))]
)
def test_parts_import_without_what_they_do_not_need(modules, parts):
    functions = [gpu_suite.PARTS[part] for part in parts]
    code = f"import pkgutil, benchmarks.gpu_part; [pkgutil.resolve_name(name) for name in {functions}]"
    status, output = run_without(modules, code)
    assert status == 0, output
    assert all(callable(pkgutil.resolve_name(function)) for function in functions)
