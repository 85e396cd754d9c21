"""Utilisation of a GPU: the peak is found by the device's name."""

import pytest

from benchmarks.gpu_training import mfu, peak_bf16_flops


def test_utilisation_is_work_over_peak():
    assert mfu(1e6, 2e6, 1e13) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("CPU", None)]
)
def test_peak_is_found_by_name(name, peak):
    assert peak_bf16_flops(name) == peak
