"""A step on CUDA has no wait for the device, no mixture of devices, and bf16 where it is asked for: without a GPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.cuda_dry_run.cases import BF16, CASES, PLANTS, SAVED, SCORED, STEPS_TWICE

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the shim that stands for a CUDA driver"),
]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Label -> what a case showed. One process runs all, because the shim must be loaded before torch."""
    pytest.importorskip("triton", reason="needs triton, whose launches of HSTU's kernels are checked")
    path = tmp_path_factory.mktemp("dry_run") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda_dry_run.dry_run", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text()) | json.loads(path.with_name("others.json").read_text())


@pytest.mark.parametrize("label", [*CASES, "frozen", *(f"{label} scored" for label in SCORED)])
def test_nothing_waits_and_no_devices_mix(results, label):
    result = results[label]
    assert not result["error"] and not result["waits"], result
    assert not result["without_gradient"]
    assert result["staging_syncs"] == (2 if label in SAVED else 0)  # one for each of two saves
    is_half = "bf16" in label or label == "frozen"
    assert (result["products"].get("bfloat16", 0) > 0) == is_half
    if is_half and not label.startswith("pretrain"):  # there, the products of the losses stay in float32
        assert set(result["products"]) == {"bfloat16"}


@pytest.mark.parametrize("label", CASES)
def test_a_batch_travels_in_one_copy(results, label):
    """Attention in length buckets, in float32, reads one block more."""
    reads_buckets = label in ("pretrain", "finetune", "pretrain/sasrec", "finetune/sasrec", "finetune/dmin")
    assert results[label]["copies"] == [1 + reads_buckets] * (1 + (label in STEPS_TWICE))


@pytest.mark.parametrize("label", [label for label in CASES if "hstu" in label])
def test_hstu_runs_its_kernels(results, label):
    has_time = [] if label.endswith("no_time") else ["_fill_buckets"]
    assert results[label]["launched"] == ["_backward_keys", "_backward_queries", *has_time, "_forward"]


@pytest.mark.parametrize("name", PLANTS)
def test_planted_faults_are_found(results, name):
    """A plant is the same run as a case, which is clean, with one fault more."""
    result, (label, found) = results[f"planted {name}"], PLANTS[name]
    assert label in CASES
    assert found in result["error"] + " ".join(result["waits"]), result


def test_a_checkpoint_that_is_copied_to_pageable_memory_is_found(results):
    assert "device to host" in " ".join(results["planted pageable checkpoint"]["waits"])


def test_a_batch_in_pageable_memory_or_in_many_pieces_is_found(results):
    assert "host to device" in " ".join(results["planted pageable batch"]["waits"])
    assert results["planted copies"]["copies"][0] > 20


def test_autocast_that_is_off_is_found(results):
    assert BF16 and set(results["planted no autocast"]["products"]) == {"float32"}


@pytest.mark.parametrize(
    "name",
    [
        *("validation of pretraining", "validation of finetuning", "mean of the weights", "predictions"),
        *("managed ids", "metrics", "resuming"),
    ],
)
def test_what_needs_numbers_has_those_of_the_cpu(results, name):
    """On tensors that say they are on CUDA; the counts show that the device was asked at all."""
    assert results[f"labelled {name}"]["right"] and results[f"labelled {name}"]["waits"], results[f"labelled {name}"]


@pytest.mark.parametrize("name", ["index", "export and api.load"])
def test_what_serves_stays_on_the_cpu_beside_a_gpu(results, name):
    assert results[f"labelled {name}"]["right"], results[f"labelled {name}"]
    assert "'CUDA' backend" in results["labelled planted scorer on the device"]["error"]


def test_mixed_devices_and_wrong_numbers_are_found_there(results):
    planted = results["labelled planted sums on the host"]
    assert "operands on cuda:0 and on the CPU, [(7,)] at ranking.py" in planted["error"], planted
    planted = results["labelled planted wrong rows"]
    assert not planted["right"] and not planted["error"], planted


TOWERS = [f"{stage}/{name}" for name in ("transformer", "sasrec", "hstu") for stage in ("pretrain", "finetune")]
MAX_OF_PARTS = {
    "embedding": 23,
    "tower": 222,
    "head + loss": 119,
    "clipping": 8,
    "update": 4,
}  # as docs/performance.md
MAX_OPERATIONS, MAX_OTHER_GB = 376, 41.0  # of a step of L4H256A4; 376 and 40.6 when written


@pytest.mark.parametrize("name", [*TOWERS, "l4h256a4"])
def test_the_plan_counts_the_flops_of_a_step(results, name):
    """0.1 %: without last layers of heads, of one output each."""
    counted = results[f"roofline {name}"]
    assert counted["planned_flops"] == pytest.approx(counted["product_flops"], rel=1e-3)


@pytest.mark.parametrize("name", [*TOWERS, "l4h256a4"])
def test_the_plan_counts_what_a_tower_keeps(results, name):
    """The Transformer's formula counts 3 % too much. Others are measured on a CPU: HSTU 1.006 and 1.007; SASRec 1.05
    and 1.12, since attention copies more there. `plan` keeps 15 % of the memory free.
    """
    counted = results[f"roofline {name}"]
    most = {"sasrec": 1.15, "hstu": 1.02}.get(name.rpartition("/")[2], 1.06)
    assert 1.0 <= counted["planned_kept_bytes"] / counted["kept_bytes"] <= most, counted


MAX_BESIDE_GRAPH = {"l4h256a4": 50, "l4h256a4/ranking": 83}  # operations that a step launches one by one


@pytest.mark.parametrize("name", MAX_BESIDE_GRAPH)
def test_head_and_losses_are_in_the_graph(results, name):
    plain, graphs = (results[f"roofline {name}{suffix}"]["of_parts"] for suffix in ("", "/graphs"))
    assert set(graphs) == {"embedding", "graph", "clipping", "update"}, graphs
    assert graphs["graph"] > plain["tower"] + 90, (graphs, plain)
    assert sum(graphs.values()) - graphs["graph"] <= MAX_BESIDE_GRAPH[name], graphs
    assert sum(plain.values()) - plain["tower"] > 1.9 * MAX_BESIDE_GRAPH[name], plain


def test_a_step_stays_within_its_roofline(results):
    found, planted = results["roofline l4h256a4"], results["roofline planted pass"]
    assert found["operations"] <= MAX_OPERATIONS and found["other_bytes"] <= MAX_OTHER_GB * 1e9, found
    assert sum(found["of_parts"].values()) == found["operations"]
    assert all(found["of_parts"][part] <= most for part, most in MAX_OF_PARTS.items()), found["of_parts"]
    assert planted["operations"] > MAX_OPERATIONS and planted["other_bytes"] > MAX_OTHER_GB * 1e9, planted
