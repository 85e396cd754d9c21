import itertools
import math

import pytest
import torch
from torch import nn

from gpsd_dist.config import ModelConfig, OptimizerConfig, TablesConfig
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.optim import WeightAverage, dense_optimizer, learning_rate_factor, named_state
from gpsd_dist.tables.collections import lookup_tables
from tests.helpers.synthetic import make_manifest

CONFIG = OptimizerConfig("adamw", 0.01, weight_decay=0.5, beta1=0.8, beta2=0.7, eps=1e-6)


@pytest.fixture
def model():
    manifest, tables = make_manifest(), TablesConfig(embedding_dim=8)
    sharded = lookup_tables(manifest, tables, with_candidates=True)
    return RankingModel(manifest, tables, ModelConfig(layers=1, width=16, heads=2), sharded, ("click", "buy"))


def test_only_matrices_of_linear_layers_decay(model):
    optimizer = dense_optimizer(model, CONFIG)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decaying = {name for name, parameter in model.named_parameters() if decay[id(parameter)]}
    assert {decay[id(p)] for p in model.parameters()} == {0.0, 0.5}
    assert decaying == {
        "backbone.project_in.layers.1.weight",
        "backbone.tower.blocks.0.qkv.weight",
        "backbone.tower.blocks.0.attention_out.weight",
        "backbone.tower.blocks.0.gate_up.weight",
        "backbone.tower.blocks.0.down.weight",
        *(f"heads.mlps.{task}.{layer}.weight" for task in ("click", "buy") for layer in (0, 2)),
    }


def test_every_parameter_is_in_exactly_one_group(model):
    listed = [id(p) for group in dense_optimizer(model, CONFIG).param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_settings_arrive():
    for group in dense_optimizer(nn.Linear(2, 2), CONFIG).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.7), 1e-6)


def test_decay_shrinks_a_matrix_and_leaves_a_bias():
    layer = nn.Linear(3, 2)
    before = [p.detach().clone() for p in (layer.weight, layer.bias)]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    dense_optimizer(layer, CONFIG).step()
    torch.testing.assert_close(layer.weight, before[0] * (1 - 0.01 * 0.5))
    assert torch.equal(layer.bias, before[1])


def test_named_state_is_allocated_and_live(model):
    optimizer = dense_optimizer(model, CONFIG)
    state = named_state(optimizer, model)
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state.values())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, entry in state.items():
        assert entry["step"].item() == 1, name
        torch.testing.assert_close(entry["exp_avg"], torch.full_like(entry["exp_avg"], 0.2))


def test_restoring_named_state_in_place_continues_the_run():
    def steps(layer, optimizer, first, last):
        for step in range(first, last):
            for index, parameter in enumerate(layer.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (step + index + 1))
            optimizer.step()

    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    other = nn.Linear(3, 2)
    other.load_state_dict(layer.state_dict())
    optimizer = dense_optimizer(layer, CONFIG)
    steps(layer, optimizer, 0, 5)
    first = dense_optimizer(other, CONFIG)
    steps(other, first, 0, 2)
    resumed = dense_optimizer(other, CONFIG)
    saved = named_state(first, other)
    for name, entry in named_state(resumed, other).items():
        for key, value in entry.items():
            value.copy_(saved[name][key])
    steps(other, resumed, 2, 5)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),  # never 0: the first step is not wasted
        (4, 0.5),
        (9, 1.0),  # last step of the warm-up
        (10, 1.0),  # first of the cosine
        (60, 0.2 + 0.8 * 0.5),  # half way down
        (85, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.75))),
        (110, 0.2),
        (111, 0.2),
        (10_000, 0.2),
    ],
)
def test_values(step, expected):
    assert learning_rate_factor(step, 110, 10, 0.2) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_it_starts_at_the_peak():
    assert learning_rate_factor(0, 10, 0, 0.1) == 1.0


def test_rises_then_falls():
    factors = [learning_rate_factor(step, 50, 7, 0.1) for step in range(60)]
    assert all(a < b for a, b in itertools.pairwise(factors[:7]))
    assert all(a > b for a, b in itertools.pairwise(factors[7:51]))


@pytest.mark.parametrize("total", [0, 1, 5])
def test_a_warmup_as_long_as_the_run_divides_by_nothing(total):
    assert [learning_rate_factor(step, total, total, 0.1) for step in (total, total + 1)] == [1.0, 0.1]


def test_a_final_fraction_of_one_keeps_the_rate_to_the_bit():
    assert {learning_rate_factor(step, 50, 0, 1.0) for step in range(60)} == {1.0}


def test_the_mean_of_weights_reaches_back_over_a_fraction_of_the_steps():
    layer = nn.Linear(1, 1, bias=False)
    average = WeightAverage(layer, 0.1)
    for step in range(1000):
        layer.weight.data.fill_(step)
        average.update(step)
        if step == 0:
            assert average.other["weight"].item() == 0  # what the model was built with has no part in it
    # Step n of N counts as n^9: the mean of n is 10/11 N.
    assert average.other["weight"].item() == pytest.approx(1000 * 10 / 11, rel=0.01)


def test_means_stand_in_the_place_of_weights_for_a_while(model):
    average = WeightAverage(model, 0.5)
    last = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    means = {name: torch.randn_like(value) for name, value in last.items()}
    for name, value in means.items():
        average.other[name].copy_(value)

    def holds(found, expected):
        return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

    with pytest.raises(KeyError, match="in the middle"), average.in_place():
        assert holds(dict(model.named_parameters()), means) and holds(average.other, last)
        raise KeyError("in the middle")
    assert holds(dict(model.named_parameters()), last) and holds(average.other, means)


def test_without_a_fraction_weights_stay_and_nothing_is_kept(model):
    average = WeightAverage(model, 0.0)
    average.update(0)
    last = [parameter.detach().clone() for parameter in model.parameters()]
    with average.in_place():
        assert all(map(torch.equal, last, model.parameters()))
    assert not average.other
