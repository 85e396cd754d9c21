"""Computes a trained Transformer in two parts, so that a history is encoded once, and its keys and values are kept.

`Encode` turns history tokens into keys and values of every layer, after those of an earlier part of the same history;
`Score` lets candidates attend to them. Weights are those of `model.transformer`, rearranged: gains of norms go into the
layers behind them, and channels that rotate together stand half a head apart, so that nothing is complex or strided.
Sizes are free (requests, tokens, candidates), and all operations have an ONNX form.

Shape letters: B requests, P tokens encoded before, N new tokens, W = P + N, K candidates, D width, H heads,
A channels of a head, L layers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.model.transformer import ROPE_THETA, Block, Transformer
from gpsd_dist.parameter_names import module_key


class _Layer(nn.Module):
    """Holds the rearranged weights of one block."""

    def __init__(self, block: Block, width: int):
        super().__init__()
        self.heads, self.eps = block.heads, float(block.attention_norm.eps or 0.0)
        head_width = width // block.heads
        halves = torch.cat([torch.arange(0, head_width, 2), torch.arange(1, head_width, 2)])
        order = (torch.arange(block.heads)[:, None] * head_width + halves).flatten()
        query, key, value = (block.qkv.weight * block.attention_norm.weight).detach().chunk(3)
        # Logits are divided by sqrt(A) once, in the weights.
        self.query = nn.Parameter(query[order] * head_width**-0.5, requires_grad=False)
        self.key_value = nn.Parameter(torch.cat([key[order], value]), requires_grad=False)
        self.out = nn.Parameter(block.attention_out.weight.detach(), requires_grad=False)
        self.gate_up = nn.Parameter((block.gate_up.weight * block.ffn_norm.weight).detach(), requires_grad=False)
        self.down = nn.Parameter(block.down.weight.detach(), requires_grad=False)

    def unit(self, x_D: torch.Tensor) -> torch.Tensor:
        """Divides by the root mean square: [..., D]."""
        return x_D * torch.rsqrt((x_D * x_D).mean(-1, keepdim=True) + self.eps)

    def split(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Parts heads: [B, N, D] -> [B, H, N, A]."""
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, unit_BND: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]):
        """Computes keys, turned by their positions, and values: [B, H, N, A] each."""
        key, value = F.linear(unit_BND, self.key_value).chunk(2, -1)
        return _turned(self.split(key), turn), self.split(value)

    def after(self, x_BND: torch.Tensor, attended_BHNA: torch.Tensor) -> torch.Tensor:
        """Adds what attention gives, then the feed-forward part: [B, N, D]."""
        x_BND = x_BND + F.linear(attended_BHNA.transpose(1, 2).flatten(-2), self.out)
        gate, up = F.linear(self.unit(x_BND), self.gate_up).chunk(2, -1)
        return x_BND + F.linear(F.silu(gate) * up, self.down)


def _turned(x_BHNA: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = turn
    first, second = x_BHNA.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class _Form(nn.Module):
    """Holds what both parts share."""

    def __init__(self, tower: Transformer):
        super().__init__()
        width = tower.out_width
        self.layers = nn.ModuleList(_Layer(block, width) for block in tower.blocks)  # type: ignore[arg-type]
        head_width = width // tower.rotary.heads
        exponent = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
        self.frequency = nn.Parameter(ROPE_THETA**-exponent, requires_grad=False)

    def turn(self, position_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes cosine and sine of the angles of positions: [B, 1, N, A / 2] each."""
        angle = position_BN[:, None, :, None].to(torch.float32) * self.frequency
        return angle.cos(), angle.sin()


class Encode(_Form):
    """Encodes the tokens of histories that follow `P` encoded ones; all requests of a call have the same P."""

    def forward(self, x_BND: torch.Tensor, keys_LBHPA: torch.Tensor, values_LBHPA: torch.Tensor):
        """Returns keys and values of all W tokens: [L, B, H, W, A] each. Padding at the end is for `Score` to hide."""
        num_old, num_new = keys_LBHPA.shape[3], x_BND.shape[1]
        position_N = torch.arange(num_new, device=x_BND.device) + num_old
        turn = self.turn(position_N[None])
        position_W = torch.arange(num_old + num_new, device=x_BND.device)
        hidden_NW = torch.where(position_W[None] <= position_N[:, None], 0.0, float("-inf"))
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            unit = layer.unit(x_BND)
            key, value = layer.keys_values(unit, turn)
            keys.append(torch.cat([keys_LBHPA[index], key], 2))
            values.append(torch.cat([values_LBHPA[index], value], 2))
            if index + 1 < len(self.layers):  # behind the last layer nothing of a history is read
                query = _turned(layer.split(F.linear(unit, layer.query)), turn)
                weight = (query @ keys[-1].transpose(-1, -2) + hidden_NW).softmax(-1)
                x_BND = layer.after(x_BND, weight @ values[-1])
        return torch.stack(keys), torch.stack(values)


class Score(_Form):
    """Scores candidates by the keys and values of their histories."""

    def __init__(self, model: RankingModel, tasks: tuple[str, ...]):
        tower = model.backbone.tower
        assert isinstance(tower, Transformer)
        super().__init__(tower)
        self.gain = nn.Parameter(tower.norm.weight.detach(), requires_grad=False)
        self.mlps = nn.ModuleList(model.heads.mlps[module_key(task)] for task in tasks)

    def forward(
        self,
        x_BKD: torch.Tensor,
        context_BKC: torch.Tensor,
        length_B: torch.Tensor,
        keys_LBHWA: torch.Tensor,
        values_LBHWA: torch.Tensor,
    ) -> torch.Tensor:
        """Returns logits [tasks, B, K]. `length_B`: tokens of each history; those behind are padding."""
        position_W = torch.arange(keys_LBHWA.shape[3], device=x_BKD.device)
        hidden_B11W = torch.where(position_W < length_B[:, None], 0.0, float("-inf"))[:, None, None]
        turn = self.turn(length_B[:, None])  # every candidate stands right behind the history
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            unit = layer.unit(x_BKD)
            own_key, own_value = layer.keys_values(unit, turn)
            query = _turned(layer.split(F.linear(unit, layer.query)), turn)
            score_BHKW = query @ keys_LBHWA[index].transpose(-1, -2) + hidden_B11W
            own_BHK1 = (query * own_key).sum(-1, keepdim=True)
            weight = torch.cat([score_BHKW, own_BHK1], -1).softmax(-1)
            num_own = weight.shape[-1] - 1
            attended = weight[..., :num_own] @ values_LBHWA[index] + weight[..., num_own:] * own_value
            x_BKD = layer.after(x_BKD, attended)
        state = torch.cat([self.layers[0].unit(x_BKD) * self.gain, context_BKC], -1)
        return torch.stack([mlp(state).squeeze(-1) for mlp in self.mlps])
