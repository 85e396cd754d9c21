import pytest
import torch

from gpsd_dist.config import ModelConfig
from gpsd_dist.model.transformer import Transformer, ffn_width


@pytest.mark.parametrize(
    # 32 * ceil(int(8 H / 3) / 32), the official rule, by hand for every width of the paper.
    ("width", "hidden"),
    [(32, 96), (64, 192), (96, 256), (128, 352), (256, 704), (512, 1376), (1024, 2752)],
)
def test_ffn_width_is_the_official_one(width, hidden):
    assert ffn_width(width) == hidden


@pytest.mark.parametrize(
    ("layers", "width", "heads", "parameters"),
    # layers x (4 D^2 attention + 3 D F feed-forward + 2 D norms) + D. The paper: 13 K, 0.2 M, 3.2 M and 0.3 B.
    [
        (1, 32, 4, 13_408),
        (4, 64, 4, 213_568),
        (4, 256, 4, 3_213_568),
        (24, 1024, 16, 303_612_928),
    ],
)
def test_parameter_count_is_the_published_one(layers, width, heads, parameters):
    with torch.device("meta"):
        tower = Transformer(ModelConfig(layers=layers, width=width, heads=heads), 1)
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters


def test_initial_weights_follow_the_official_settings():
    torch.manual_seed(0)
    for name, parameter in Transformer(ModelConfig(layers=2, width=64, heads=4), 1).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 1e-3, name


def test_there_are_no_biases():
    assert not [
        name
        for name, _ in Transformer(ModelConfig(layers=1, width=32, heads=4), 1).named_parameters()
        if "bias" in name
    ]
