"""Rearranges the trained layers of Transformer, SASRec and HSTU so that histories and candidates are computed apart.

Every layer offers the same five steps; `two_part_form` runs them. All operations have an ONNX form, and none is complex
or strided: gains of norms go into the weights behind them, and channels that rotate together stand half a head apart.

Shape letters: B requests, N tokens computed now, W tokens of a history, K candidates, D width, H heads, A channels of a
head.
"""

import typing

import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.model import hstu, sasrec, transformer
from gpsd_dist.model.ops.hstu_bias import BiasWeights, num_positions

Turn: typing.TypeAlias = tuple[torch.Tensor, torch.Tensor] | None
Attended: typing.TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Layer(typing.Protocol):
    """Names the steps of a layer. Queries, keys and values are [B, H, N, A]."""

    heads: int
    head_width: int

    def normed(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Computes what both queries and `after` read."""

    def keys_values(
        self, x_BND: torch.Tensor, normed_BND: torch.Tensor, turn: Turn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes what is kept of a token."""

    def query(self, normed_BND: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Computes what a token looks for."""

    def of_history(self, query_keys_values: Attended, distance_NW: torch.Tensor, bucket_BNW) -> torch.Tensor:
        """Attends to tokens up to itself. `distance_NW`: position of the key minus that of the query."""

    def of_candidates(
        self, query_keys_values: Attended, own: tuple[torch.Tensor, torch.Tensor], distance_BW: torch.Tensor, bucket_BV
    ) -> torch.Tensor:
        """Attends to the tokens of a history that come before the candidate, and to the candidate's `own` key, value.

        `bucket_BV`: time buckets of the W tokens, and of the candidate itself; None without a time bias.
        """

    def after(self, x_BND: torch.Tensor, normed_BND: torch.Tensor, attended_BHNA: torch.Tensor) -> torch.Tensor:
        """Computes the layer's output [B, N, D]."""


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def _split(x_BND: torch.Tensor, heads: int) -> torch.Tensor:
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x_BHNA: torch.Tensor) -> torch.Tensor:
    return x_BHNA.transpose(1, 2).flatten(-2)


def _hidden(distance: torch.Tensor) -> torch.Tensor:
    return torch.where(distance <= 0, 0.0, float("-inf"))


def _softmax_of_history(query, keys, values, distance_NW: torch.Tensor) -> torch.Tensor:
    return (query @ keys.transpose(-1, -2) + _hidden(distance_NW)).softmax(-1) @ values


def _softmax_of_candidates(query, keys, values, own_key, own_value, distance_BW: torch.Tensor) -> torch.Tensor:
    # A distance of 0 is the candidate's own position: padding, because a history ends before it.
    score_BHKW = query @ keys.transpose(-1, -2) + _hidden(distance_BW + 1)[:, None, None]
    weight = torch.cat([score_BHKW, (query * own_key).sum(-1, keepdim=True)], -1).softmax(-1)
    num_tokens = weight.shape[-1] - 1
    return weight[..., :num_tokens] @ values + weight[..., num_tokens:] * own_value


class TransformerLayer(nn.Module):
    """Rearranges `model.transformer.Block`."""

    def __init__(self, block: transformer.Block):
        super().__init__()
        width, self.heads, self.eps = block.qkv.in_features, block.heads, float(block.attention_norm.eps or 0.0)
        self.head_width = width // block.heads
        halves = torch.cat([torch.arange(0, self.head_width, 2), torch.arange(1, self.head_width, 2)])
        order = (torch.arange(block.heads)[:, None] * self.head_width + halves).flatten()
        query, key, value = (block.qkv.weight * block.attention_norm.weight).detach().chunk(3)
        # Logits are divided by sqrt(A) once, in the weights.
        self.queries = _frozen(query[order] * self.head_width**-0.5)
        self.key_value = _frozen(torch.cat([key[order], value]))
        self.out = _frozen(block.attention_out.weight)
        self.gate_up = _frozen(block.gate_up.weight * block.ffn_norm.weight)
        self.down = _frozen(block.down.weight)

    def normed(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Divides by the root mean square."""
        return x_BND * torch.rsqrt((x_BND * x_BND).mean(-1, keepdim=True) + self.eps)

    def keys_values(self, x_BND, normed_BND, turn):
        key, value = F.linear(normed_BND, self.key_value).chunk(2, -1)
        return _turned(_split(key, self.heads), turn), _split(value, self.heads)

    def query(self, normed_BND, turn):
        return _turned(_split(F.linear(normed_BND, self.queries), self.heads), turn)

    def of_history(self, query_keys_values, distance_NW, bucket_BNW):
        return _softmax_of_history(*query_keys_values, distance_NW)

    def of_candidates(self, query_keys_values, own, distance_BW, bucket_BV):
        return _softmax_of_candidates(*query_keys_values, *own, distance_BW)

    def after(self, x_BND, normed_BND, attended_BHNA):
        x_BND = x_BND + F.linear(_joined(attended_BHNA), self.out)
        gate, up = F.linear(self.normed(x_BND), self.gate_up).chunk(2, -1)
        return x_BND + F.linear(F.silu(gate) * up, self.down)


def _turned(x_BHNA: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = turn
    first, second = x_BHNA.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class SASRecLayer(nn.Module):
    """Rearranges `model.sasrec.SASRecBlock`: queries are normed, keys and values are not."""

    def __init__(self, block: sasrec.SASRecBlock):
        super().__init__()
        self.heads, self.head_width = block.heads, block.query.in_features // block.heads
        self.block = block

    def normed(self, x_BND: torch.Tensor) -> torch.Tensor:
        return sasrec.normed(x_BND)

    def keys_values(self, x_BND, normed_BND, turn):
        key, value = self.block.key_value(x_BND).chunk(2, -1)
        return _split(key, self.heads), _split(value, self.heads)

    def query(self, normed_BND, turn):
        return _split(self.block.query(normed_BND) * self.head_width**-0.5, self.heads)

    def of_history(self, query_keys_values, distance_NW, bucket_BNW):
        return _softmax_of_history(*query_keys_values, distance_NW)

    def of_candidates(self, query_keys_values, own, distance_BW, bucket_BV):
        return _softmax_of_candidates(*query_keys_values, *own, distance_BW)

    def after(self, x_BND, normed_BND, attended_BHNA):
        h_BND = sasrec.normed(normed_BND + self.block.attention_out(_joined(attended_BHNA)))
        return h_BND + self.block.down(F.relu(self.block.up(h_BND)))


class HSTULayer(nn.Module):
    """Rearranges `model.hstu.HSTUBlock`: values are divided by the number of positions once, where they are kept."""

    def __init__(self, block: hstu.HSTUBlock):
        super().__init__()
        self.heads, self.head_width = block.heads, block.out.in_features // block.heads
        bias = BiasWeights(block.position_bias, block.time_bias)
        self.positions, self.eps = num_positions(bias), hstu.NORM_EPS
        gate, value, query, key = block.uvqk.weight.chunk(4)
        self.queries, self.gates, self.key_value = _frozen(query), _frozen(gate), _frozen(torch.cat([key, value]))
        self.position_bias = _frozen(block.position_bias)
        self.time_bias = None if block.time_bias is None else _frozen(block.time_bias)
        self.out = block.out

    def normed(self, x_BND: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_BND, x_BND.shape[-1:], eps=self.eps)

    def keys_values(self, x_BND, normed_BND, turn):
        key, value = F.silu(F.linear(normed_BND, self.key_value)).chunk(2, -1)
        return _split(key, self.heads), _split(value / self.positions, self.heads)

    def query(self, normed_BND, turn):
        return _split(F.silu(F.linear(normed_BND, self.queries)), self.heads)

    def of_history(self, query_keys_values, distance_NW, bucket_BNW):
        query, keys, values = query_keys_values
        bias = self.position_bias[distance_NW + (self.positions - 1)][None]
        if self.time_bias is not None:
            bias = bias + self.time_bias[bucket_BNW]
        weight = F.silu(query @ keys.transpose(-1, -2) + bias[:, None])
        return torch.where(distance_NW <= 0, weight, 0.0) @ values

    def of_candidates(self, query_keys_values, own, distance_BW, bucket_BV):
        (query, keys, values), (own_key, own_value) = query_keys_values, own
        bias_BW, own_bias = (
            self.position_bias[distance_BW + (self.positions - 1)],
            self.position_bias[self.positions - 1],
        )
        if self.time_bias is not None:
            time_BV = self.time_bias[bucket_BV]
            bias_BW, own_bias = bias_BW + time_BV[:, :-1], own_bias + time_BV[:, -1, None, None, None]
        weight = F.silu(query @ keys.transpose(-1, -2) + bias_BW[:, None, None])
        own_weight = F.silu((query * own_key).sum(-1, keepdim=True) + own_bias)
        return torch.where((distance_BW < 0)[:, None, None], weight, 0.0) @ values + own_weight * own_value

    def after(self, x_BND, normed_BND, attended_BHNA):
        gate_BND = F.silu(F.linear(normed_BND, self.gates))
        return x_BND + self.out(gate_BND * self.normed(_joined(attended_BHNA)))
