"""The compiled tower on CUDA is Triton kernels, products and our attention: no fallback to eager, and few kernels."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the shim that stands for a CUDA driver"),
]
ALLOWED = {"gpsd_dist.two_part_attention.default", "gpsd_dist.two_part_attention_backward.default"}
# Of two layers, in what torch 2.13 writes. One kernel more for each layer is about 1 % of a step of L24H1024A16.
MAX_KERNELS = {
    "pretrain": (20, 26),
    "ranking": (20, 24),
    "pretraining with loss": (30, 35),
    "ranking with loss": (32, 38),  # of two tasks
}
# Two of attention and two of SwiGLU a layer, each twice in the backward, and two of a head. The sampled softmax has all
# of its three in the forward, the auxiliary one has one there.
MAX_PRODUCTS = {
    "pretrain": (8, 16),
    "ranking": (8, 16),
    "pretraining with loss": (12, 18),
    "ranking with loss": (12, 22),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case -> what forward and backward launch. One process of its own: the shim must be loaded before torch."""
    pytest.importorskip("triton", reason="needs triton, in whose language Inductor writes")
    path = tmp_path_factory.mktemp("inductor") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda_compile.inductor", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", MAX_KERNELS)
def test_the_compiled_tower_has_few_kernels_and_no_fallback(results, case):
    forward, backward = results[case]
    assert {*forward["fallbacks"], *backward["fallbacks"]} == ALLOWED
    for found, kernels, products in zip((forward, backward), MAX_KERNELS[case], MAX_PRODUCTS[case], strict=True):
        assert 0 < found["kernels"] <= kernels and 0 < found["products"] <= products, found


def test_complex_numbers_are_found(results):
    found = {name for part in results["planted complex numbers"] for name in part["fallbacks"]} - ALLOWED
    assert any("complex" in name for name in found), results["planted complex numbers"]
