import torch

from gpsd_dist.model.heads import RankingHeads
from tests.helpers.reference import fill_


def test_direct_columns_skip_the_hidden_layers():
    """They join the last hidden layer, which has no ReLU then."""
    heads = fill_(RankingHeads(("click", "buy"), 7, (5, 4), 0.02, direct_width=2))
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    for task, logit in heads(x).items():
        first, _, second, _, last = heads.mlps[task]
        hidden = (x[:, 2:] @ first.weight.T + first.bias).clamp(min=0)
        hidden = hidden @ second.weight.T + second.bias
        assert (hidden < 0).any()
        expected = hidden @ last.weight[0, :4] + x[:, :2] @ last.weight[0, 4:] + last.bias
        torch.testing.assert_close(logit, expected, rtol=1e-4, atol=1e-4)


def test_without_hidden_layers_the_head_is_linear():
    heads = fill_(RankingHeads(("click",), 3, (), 0.02))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    [linear] = heads.mlps["click"]
    torch.testing.assert_close(heads(x)["click"], x @ linear.weight[0] + linear.bias)


def test_an_offset_is_added_to_the_first_task_and_seen_by_no_layer():
    plain = fill_(RankingHeads(("click", "buy"), 7, (5, 4), 0.02, direct_width=2))
    heads = fill_(RankingHeads(("click", "buy"), 7, (5, 4), 0.02, direct_width=2, has_offset=True))
    assert [p.shape for p in heads.parameters()] == [p.shape for p in plain.parameters()]
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    found, expected = heads(x), plain(x[:, :7])
    assert torch.equal(found["click"], expected["click"] + x[:, 7])
    assert torch.equal(found["buy"], expected["buy"])
