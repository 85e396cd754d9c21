"""Attends causally on CPU with several requests in one row (`gpsd_dist.batch.row_layout`).

Shape letters: S tokens in packed order, C candidates, R slots of all rows, H heads, K head width, n rows of a block,
W slots per row.
"""

import typing

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gpsd_dist.batch.row_layout import AttentionRows


def in_rows(qkv_S3HK: torch.Tensor, rows: AttentionRows, dropout: float = 0.0) -> torch.Tensor:
    """Computes the attention output [S, H * K] of all tokens in packed order."""
    qkv, out = _ToSlots.apply(qkv_S3HK, rows), []
    for index, block in enumerate(rows.blocks):
        qkv_nHWK = qkv[3 * index : 3 * index + 3]
        mask = None if block.mask is None else block.mask.to(qkv_S3HK.dtype)
        out_nHWK = F.scaled_dot_product_attention(*qkv_nHWK, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        out.append(out_nHWK.transpose(1, 2).flatten(0, 1).flatten(1))
    return _FromSlots.apply(out[0] if len(out) == 1 else torch.cat(out), rows.slot_S)


class _ToSlots(torch.autograd.Function):
    """Moves [S, 3, H, K] to the queries, keys and values of every block, [n, H, W, K] each.

    A token has exactly one slot, so the backward reads its gradient there instead of adding up; the gradient of padding
    is dropped. The backward writes all gradients into one buffer once. Autograd would copy them three times: per block,
    over all blocks, and to swap heads and slots.
    """

    @staticmethod
    def forward(ctx, x_S3HK, rows):
        ctx.rows, ctx.token_shape = rows, x_S3HK.shape[1:]
        return tuple(part for block in _blocks(x_S3HK.index_select(0, rows.entry_R), rows) for part in block)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grad_R3HK = grads[0].new_empty(len(ctx.rows.entry_R), *ctx.token_shape)
        parts = [part for block in _blocks(grad_R3HK, ctx.rows) for part in block]
        for part_nHWK, grad_nHWK in zip(parts, grads, strict=True):
            part_nHWK.copy_(grad_nHWK)
        return grad_R3HK.index_select(0, ctx.rows.slot_S), None


def _blocks(slots_R3HK: torch.Tensor, rows: AttentionRows) -> typing.Iterator[tuple[torch.Tensor, ...]]:
    """Yields views of queries, keys and values of each block: [n, H, W, K]"""
    sizes = [block.num_rows * block.width for block in rows.blocks]
    for block, slots_r3HK in zip(rows.blocks, slots_R3HK.split(sizes), strict=True):
        yield slots_r3HK.unflatten(0, (block.num_rows, block.width)).permute(2, 0, 3, 1, 4).unbind(0)


class _FromSlots(torch.autograd.Function):
    """Moves slots back to tokens; padding gets zero gradient."""

    @staticmethod
    def forward(ctx, x_R, slot_S):
        ctx.save_for_backward(slot_S)
        ctx.num_slots = len(x_R)
        return x_R.index_select(0, slot_S)

    @staticmethod
    def backward(ctx, grad_S):
        (slot_S,) = ctx.saved_tensors
        return grad_S.new_zeros(ctx.num_slots, *grad_S.shape[1:]).index_copy_(0, slot_S, grad_S), None
