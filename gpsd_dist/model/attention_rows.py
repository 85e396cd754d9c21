"""Causal attention of a packed batch in shared rows (`gpsd_dist.packing_rows`): what runs on CPU.

Shape letters: S tokens in packed order, C candidates, R slots of all rows, H heads, K head width, n rows of a block,
W slots per row.
"""

import torch
import torch.nn.functional as F

from gpsd_dist.packing_rows import AttentionRows, RowBlock


def in_rows(qkv_S3HK: torch.Tensor, rows: AttentionRows, num_skipped: int = 0, dropout: float = 0.0) -> torch.Tensor:
    """Attention output [S - num_skipped, H * K] of the last tokens in packed order."""
    slots_R3HK = _ToSlots.apply(qkv_S3HK, rows.entry_R, rows.slot_S)
    parts = slots_R3HK.split([block.num_rows * block.width for block in rows.blocks])
    out = [_attend(part, block, dropout) for part, block in zip(parts, rows.blocks, strict=True)]
    return _FromSlots.apply(out[0] if len(out) == 1 else torch.cat(out), rows.slot_S[num_skipped:])


def _attend(slots_r3HK: torch.Tensor, block: RowBlock, dropout: float) -> torch.Tensor:
    """[n W, 3, H, K] -> [n W, H K]"""
    query, key, value = slots_r3HK.unflatten(0, (block.num_rows, block.width)).permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if block.mask is None else block.mask.to(query.dtype)
    out_nHWK = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
    )
    return out_nHWK.transpose(1, 2).flatten(0, 1).flatten(1)


class _ToSlots(torch.autograd.Function):
    """Tokens into slots. Every token has one slot, so its gradient is read there instead of added up; what padding
    gives back is dropped, as nothing depends on it.
    """

    @staticmethod
    def forward(ctx, x_S, entry_R, slot_S):
        ctx.save_for_backward(slot_S)
        return x_S.index_select(0, entry_R)

    @staticmethod
    def backward(ctx, grad_R):
        (slot_S,) = ctx.saved_tensors
        return grad_R.index_select(0, slot_S), None, None


class _FromSlots(torch.autograd.Function):
    """Slots back to tokens; slots that are not read get no gradient."""

    @staticmethod
    def forward(ctx, x_R, slot_S):
        ctx.save_for_backward(slot_S)
        ctx.num_slots = len(x_R)
        return x_R.index_select(0, slot_S)

    @staticmethod
    def backward(ctx, grad_S):
        (slot_S,) = ctx.saved_tensors
        return grad_S.new_zeros(ctx.num_slots, *grad_S.shape[1:]).index_copy_(0, slot_S, grad_S), None
