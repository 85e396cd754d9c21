"""Wraps the collectives that are called directly: sums and ragged gathers."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums over ranks, in place. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Gathers every rank's tensor, in rank order. First dimensions may differ, the others must agree. Collective."""
    if dist.get_world_size() == 1:
        return [tensor]
    own = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    rows = [int(count) for count in counts]
    padding = [0, 0] * (tensor.dim() - 1) + [0, max(rows) - tensor.shape[0]]
    gathered = [tensor.new_empty((max(rows), *tensor.shape[1:])) for _ in rows]
    dist.all_gather(gathered, F.pad(tensor, padding).contiguous())
    return [part[:count] for part, count in zip(gathered, rows, strict=True)]
