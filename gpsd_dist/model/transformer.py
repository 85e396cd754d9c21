"""Implements the dense tower of GPSD (arXiv:2506.03699, section 3.1): a causal pre-norm Transformer on packed tokens.

RMSNorm, rotary positions, SwiGLU, no biases, linear weights from N(0, 0.02): the official settings. Plain
single-device PyTorch; DDP, autocast and compile are applied from outside.

Shape letters: S tokens in packed order (histories, then candidates), D width, H heads, K head width.
"""

import typing

import torch
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.ops.attention import attend
from gpsd_dist.model.ops.norms import normed, normed_linear
from gpsd_dist.model.ops.swiglu import swiglu

_NORM_EPS = 1e-5
ROPE_THETA = 1e4
_FFN_MULTIPLE = 32
_MLP_MULTIPLE = 4  # hidden width of the ranking MLP over D (official settings)


def ffn_width(width: int) -> int:
    """Returns the hidden width of SwiGLU: 8/3 of the model width, rounded up to a multiple of 32."""
    return _FFN_MULTIPLE * -(-int(8 * width / 3) // _FFN_MULTIPLE)


def init_linear(linear: nn.Linear, std: float) -> None:
    """Draws weights from N(0, std), sets the bias to 0. std 0 means 1 / sqrt(fan-in): outputs as large as inputs."""
    nn.init.normal_(linear.weight, std=std or linear.in_features**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def start_matching(query: torch.Tensor, key: torch.Tensor, heads: int) -> None:
    """Lets half of the heads begin by looking for tokens like their own, by one weight for queries and keys [H K, D].

    A tower of one head has no other half: that head does.

    Weights of N(0, 0.02) make all logits of a narrow head equal, so that hundreds of steps pass before it tells tokens
    apart. With one weight for both, the logit of two like tokens is a squared length, and that of others near 0. The
    other heads start with equal logits, as a mean of the past.
    """
    half = (heads + 1) // 2 * (len(query) // heads)
    nn.init.normal_(query[:half], std=query.shape[1] ** -0.5)
    key[:half] = query[:half]


class Rotation(typing.NamedTuple):
    """Holds a rotation for every pair of channels of queries, keys and (by 1: left alone) values, for all layers."""

    turn: torch.Tensor  # float32 [S, 3, H or 1, K / 2, 2]: cosine and sine
    back: torch.Tensor | None  # The opposite rotation, for the backward


class RotaryPositions(nn.Module):
    """Computes the rotary angles of every token, once for all layers (arXiv:2104.09864)."""

    def __init__(self, head_width: int, heads: int):
        super().__init__()
        self.head_width, self.heads = head_width, heads

    def forward(self, position_S: torch.Tensor, largest: int | None = None) -> Rotation:
        """Turns positions int64 [S] into rotations. `largest`: no position is above it."""
        # Many tokens share a position, so a CPU computes each position once. It must not be asked for the largest one:
        # that would be a wait on a GPU, and the host knows it anyway.
        if largest is None or position_S.is_cuda or torch.compiler.is_compiling():
            return self._of(position_S)
        turn, back = self._of(torch.arange(largest + 1, device=position_S.device))
        back_S = back.index_select(0, position_S) if back is not None and torch.is_grad_enabled() else None
        return Rotation(turn.index_select(0, position_S), back_S)

    def _of(self, position_S: torch.Tensor) -> Rotation:
        exponent = torch.arange(0, self.head_width, 2, device=position_S.device, dtype=torch.float32) / self.head_width
        angle = position_S[:, None].float() * ROPE_THETA**-exponent
        if position_S.is_cuda:  # complex numbers, here or below, end what a compiler fuses
            turn = torch.stack((angle.cos(), angle.sin()), dim=-1)
        else:
            turn = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
        none = torch.stack((torch.ones_like(angle), torch.zeros_like(angle)), dim=-1)
        # Values turn by 1, so that queries, keys and values stay one tensor: no split before, no copy after.
        turn = torch.stack((turn, turn, none), dim=1)[:, :, None]
        # On a CPU one product without broadcasting takes half the time. On a GPU it would read H times the memory.
        if not position_S.is_cuda:
            turn = turn.expand(-1, -1, self.heads, -1, -1).contiguous()
        return Rotation(turn, torch.stack((turn[..., 0], -turn[..., 1]), dim=-1))


class Rotate(torch.autograd.Function):
    """Rotates interleaved pairs of channels (the layout of the official weights) of queries and keys: [S, 3, H, K].

    Turns the gradient back by opposite rotations that are made once per batch and not once per layer.
    """

    @staticmethod
    def forward(ctx, x_S3HK, turn, back):
        ctx.save_for_backward(back)
        return _turned(x_S3HK, turn)

    @staticmethod
    def backward(ctx, grad_S3HK):
        (back,) = ctx.saved_tensors
        return _turned(grad_S3HK, back), None, None


def _turned(x_S3HK: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    # There is no complex bfloat16, and a rotation needs more digits than half precision has.
    wide = x_S3HK.float() if x_S3HK.dtype in (torch.bfloat16, torch.float16) else x_S3HK
    is_compiled = x_S3HK.is_cuda and torch.compiler.is_compiling()
    turned = turned_by_parts if is_compiled else turned_as_complex
    return turned(wide.unflatten(-1, (-1, 2)), turn).flatten(-2).to(x_S3HK.dtype)


def turned_as_complex(pair: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotates pairs [..., 2] by one complex product: 0.4 of the bytes, and on a CPU five to ten times as fast."""
    return torch.view_as_real(torch.view_as_complex(pair) * torch.view_as_complex(turn.to(pair.dtype)))


def turned_by_parts(pair: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotates pairs [..., 2] in real numbers, which a compiler for a GPU fuses with what stands around them."""
    (x, y), (cosine, sine) = pair.unbind(-1), turn.unbind(-1)
    return torch.stack((x * cosine - y * sine, x * sine + y * cosine), dim=-1)


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        hidden = ffn_width(width)
        self.attention_norm = nn.RMSNorm(width, eps=_NORM_EPS)
        # Queries, keys and values are one matrix, gate and up another: two large products instead of five small ones.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=_NORM_EPS)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_SD: torch.Tensor, rotation: Rotation, packing: Packing, candidates_only: bool = False
    ) -> torch.Tensor:
        """Maps states [S, D] to [S, D], or to [C, D] if only the candidates' outputs are wanted."""
        qkv_S3HK = normed_linear(x_SD, self.attention_norm, self.qkv).unflatten(-1, (3, self.heads, -1))
        attended_SD = attend(Rotate.apply(qkv_S3HK, *rotation), packing, candidates_only)
        # Everything behind the attention works token by token, so histories can be dropped here.
        if candidates_only:
            x_SD = x_SD[packing.num_history_tokens :]
        x_SD = x_SD + self.dropout(self.attention_out(attended_SD))
        return x_SD + self.dropout(swiglu(x_SD, self.ffn_norm, self.gate_up, self.down))


class Transformer(nn.Module):
    """Stacks blocks into `l{layers}h{width}a{heads}` of the paper. A `registry.Tower`."""

    reads_fields, has_segments, drops_inputs = False, True, False
    direct_width = 0

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        width, heads = config.width, config.heads
        self.out_width, self.mlp_widths = width, (_MLP_MULTIPLE * width,)
        self.rotary = RotaryPositions(width // heads, heads)
        self.blocks = nn.ModuleList(Block(width, heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width, eps=_NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, config.init_std)
        if config.starts_by_width:
            for block in self.blocks:
                query, key, value = block.qkv.weight.detach().chunk(3)
                start_matching(query, key, heads)
                nn.init.normal_(value, std=width**-0.5)

    def forward(self, x_SD: torch.Tensor, packing: Packing, candidates_only: bool = False, times=None) -> torch.Tensor:
        """Maps token vectors [S, D] to hidden states [S, D], or to [C, D] with `candidates_only`.

        A token sees its own request's earlier history and itself; candidates never see each other.
        """
        # Every candidate has the position right behind its history, however many there are: so one pass over K of them
        # gives the scores of K passes.
        rotation = self.rotary(packing.position_S, packing.max_history_length)
        for index, block in enumerate(self.blocks):
            # Histories need no state behind the last layer if only candidates are scored: keys and values are enough.
            is_last = index == len(self.blocks) - 1
            x_SD = block(x_SD, rotation, packing, candidates_only and is_last)
        return normed(x_SD, self.norm)
