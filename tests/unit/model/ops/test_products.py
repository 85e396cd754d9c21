"""Products with operands in bfloat16: as exact as their rounding, in the right layers, settled at the start."""

import dataclasses
import logging

import pytest
import torch
from torch import nn

from gpsd_dist.config import RunConfig, TrainConfig
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.distributed import matmul_dtype
from gpsd_dist.distributed.runtime import Runtime, process_group
from gpsd_dist.model.ops.products import linear, operand, use_bf16_products
from gpsd_dist.model.ops.swiglu import swiglu
from gpsd_dist.stages import losses

HALF_STEP = torch.finfo(torch.bfloat16).eps / 2  # relative error of one rounding


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_product_is_that_of_the_rounded_operands_with_one_more_rounding():
    x, weight = random(50, 32).requires_grad_(), random(24, 32, seed=1).requires_grad_()
    upstream = random(50, 24, seed=2)
    out = linear(x, weight, True)
    half_x, half_weight, half_up = (operand(t.detach(), True).double() for t in (x, weight, upstream))
    grads = torch.autograd.grad(out, (x, weight), upstream)
    wanted = (half_x @ half_weight.t(), half_up @ half_weight, half_up.t() @ half_x)
    for got, exact in zip((out, *grads), wanted, strict=True):
        assert got.dtype == torch.float32
        assert ((got - exact).abs() <= HALF_STEP * exact.abs() + 1e-5).all()
    assert not torch.equal(out, linear(x, weight, False))


def test_swiglu_rounds_the_operands_of_all_its_products():
    layers = nn.RMSNorm(32, eps=1e-5), nn.Linear(32, 128, bias=False), nn.Linear(64, 32, bias=False)
    model, x = nn.ModuleList(layers), random(200, 32)

    def run():
        leaf = x.clone().requires_grad_()
        out = swiglu(leaf, *layers)
        return out.detach(), *torch.autograd.grad(out, (leaf, *model.parameters()), random(200, 32, seed=3))

    exact = run()
    use_bf16_products(model)
    for got, wanted in zip(run(), exact, strict=True):
        error = (got - wanted).norm() / wanted.norm()
        assert got.dtype == torch.float32 and 1e-4 < error < 1e-2, error  # found: 2e-3 to 4e-3


def test_the_softmax_rounds_its_gradients_and_not_its_loss():
    query, rows = random(60, 32), random(40, 32, seed=1)
    index = torch.arange(60) % 40
    negatives = torch.arange(40).reshape(2, 20)

    def run(rounds):
        leaves = query.clone().requires_grad_(), rows.clone().requires_grad_()
        args = *leaves, index, index, negatives, negatives, (0, 30, 60), 0.05
        loss = losses.sampled_softmax(*args, rounds_operands=rounds)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    (loss, *grads), (rounded_loss, *rounded) = run(False), run(True)
    assert torch.equal(loss, rounded_loss)
    for got, wanted in zip(rounded, grads, strict=True):
        assert 1e-5 < (got - wanted).norm() / wanted.norm() < 1e-2


def test_layers_that_give_a_logit_stay_in_float32():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    names, x = list(model.state_dict()), random(5, 16)
    before, wide = model[2](x), model[0](x[:, :8])
    use_bf16_products(model)
    assert torch.equal(model[2](x), before) and not torch.equal(model[0](x[:, :8]), wide)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("is_able", [True, False])
@pytest.mark.parametrize(
    ("asked", "bf16", "recorded", "able", "unable"),
    [
        ("auto", False, None, "fp32", "fp32"),
        ("auto", True, None, "bf16", "fp32"),
        ("fp32", True, None, "fp32", "fp32"),
        ("bf16", False, None, "bf16", None),
        ("auto", False, "bf16", "bf16", "fp32"),
        ("bf16", False, "bf16", "bf16", "fp32"),
        ("auto", True, "fp32", "fp32", "fp32"),
        ("auto", False, "auto", "fp32", "fp32"),  # of a run from before the option
    ],
)
def test_what_is_asked_recorded_and_possible_settle_it(
    monkeypatch, caplog, is_able, asked, bf16, recorded, able, unable
):
    monkeypatch.setattr(matmul_dtype, "has_bf16_products", lambda: is_able)
    run = RunConfig("pretrain", "data", "out", train=TrainConfig(bf16=bf16))
    run = dataclasses.replace(run, execution=ExecutionConfig(matmul_dtype=asked))
    saved = None if recorded is None else {"execution": {"matmul_dtype": recorded}}
    caplog.set_level(logging.INFO, "gpsd_dist")
    with process_group(timeout_s=60) as runtime:
        logging.getLogger("gpsd_dist").propagate = True
        expected = able if is_able else unable
        if expected is None:
            with pytest.raises(ValueError, match="neither AVX512_BF16 nor AMX"):
                matmul_dtype.settle(run, saved, runtime)
            return
        assert matmul_dtype.settle(run, saved, runtime).execution.matmul_dtype == expected
    assert ("neither AVX512_BF16" in caplog.text) == (not is_able and able != unable)
    assert "products of the dense part" in caplog.text


def test_a_gpu_leaves_it_alone_and_refuses_bf16_where_it_is_too_old(monkeypatch):
    run = RunConfig("pretrain", "data", "out", train=TrainConfig(bf16=True))
    cuda = Runtime(0, 1, 0, torch.device("cuda"))
    monkeypatch.setattr(matmul_dtype, "all_sum", lambda count: count)  # of one rank
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert matmul_dtype.settle(run, None, cuda) == run
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="older than Ampere"):
        matmul_dtype.settle(run, None, cuda)
    assert not matmul_dtype.autocast(run, torch.device("cpu"))._enabled
