"""Rows of a frozen table as 8-bit codes with a scale and an offset of their own, inside an ordinary float32 table.

TorchRec shards tables of floats only: FBGEMM has no kernel for a sharded int8 table in training, on CPU no bfloat16
either. But a float32 holds every integer below 2^24, so three codes fit into one value exactly, and lookups, exchanges
and checkpoints, which only copy values, keep them. 64 columns take 24 instead of 64 values, 128 take 48.

Shape letters: R rows, E width, P columns of a coded row.
"""

import torch
import torch.nn.functional as F

_LEVELS = 256
_PER_VALUE = 3


def encode(rows_RE: torch.Tensor, columns: int) -> torch.Tensor:
    """Float [R, E] -> float32 [R, P = `columns`]: codes, scale, offset, zeros. A value is off by half a scale at most,
    and a scale is 1/255 of what the row spans.
    """
    rows_RE = rows_RE.float()
    low_R1, high_R1 = rows_RE.amin(1, keepdim=True), rows_RE.amax(1, keepdim=True)
    scale_R1 = (high_R1 - low_R1) / (_LEVELS - 1)
    code_RE = ((rows_RE - low_R1) / scale_R1.clamp(min=torch.finfo(torch.float32).tiny)).round()
    code_RE = F.pad(code_RE.clamp(0, _LEVELS - 1), (0, -rows_RE.shape[1] % _PER_VALUE))
    first, second, third = code_RE.unflatten(1, (-1, _PER_VALUE)).unbind(-1)
    whole = first + _LEVELS * second + _LEVELS**2 * third
    coded = torch.cat((whole, scale_R1, low_R1), dim=1)
    return F.pad(coded, (0, columns - coded.shape[1]))


def decode(coded_RP: torch.Tensor, width: int) -> torch.Tensor:
    """float32 [R, P] -> float32 [R, E = `width`]"""
    num_values = -(-width // _PER_VALUE)
    whole = coded_RP[:, :num_values].to(torch.int32)
    code = torch.stack((whole & 255, whole >> 8 & 255, whole >> 16), dim=-1).flatten(1)[:, :width]
    scale_R1, low_R1 = coded_RP[:, num_values : num_values + 2].unsqueeze(-1).unbind(1)
    return code.float().mul_(scale_R1).add_(low_R1)
