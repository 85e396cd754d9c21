"""A step on CUDA has no wait for the device, no mixture of devices, and bf16 where it is asked for: without a GPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.cuda_dry_run.cases import BF16, CASES, PLANTS, is_scored

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the shim that stands for a CUDA driver"),
]
SCORED = [label for label in CASES if is_scored(label)]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Label -> what a case showed. One process runs all, because the shim must be loaded before torch."""
    pytest.importorskip("triton", reason="needs triton, whose launches of HSTU's kernels are checked")
    path = tmp_path_factory.mktemp("dry_run") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda_dry_run.dry_run", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("label", [*CASES, "frozen", *(f"{label} scored" for label in SCORED)])
def test_nothing_waits_and_no_devices_mix(results, label):
    result = results[label]
    assert not result["error"] and not result["waits"], result
    assert not result["without_gradient"]
    is_half = "bf16" in label or label == "frozen"
    assert (result["products"].get("bfloat16", 0) > 0) == is_half
    if is_half and not label.startswith("pretrain"):  # there, the products of the losses stay in float32
        assert set(result["products"]) == {"bfloat16"}


@pytest.mark.parametrize("label", [label for label in CASES if "hstu" in label])
def test_hstu_runs_its_kernels(results, label):
    has_time = [] if label.endswith("no_time") else ["_fill_buckets"]
    assert results[label]["launched"] == ["_backward_keys", "_backward_queries", *has_time, "_forward"]


@pytest.mark.parametrize("name", PLANTS)
def test_planted_faults_are_found(results, name):
    """A plant is the same run as `finetune/bf16`, which is clean, with one line more."""
    result = results[f"planted {name}"]
    found = {
        "item": "DataDependentOutputException: aten._local_scalar_dense",
        "mask": "DynamicOutputShapeException: aten.nonzero",
        "copy": "host to device, (3,), blocking",
        "host_tensor": "index on the host",
    }[name]
    assert found in result["error"] + " ".join(result["waits"]), result


def test_autocast_that_is_off_is_found(results):
    assert BF16 and set(results["planted no autocast"]["products"]) == {"float32"}
