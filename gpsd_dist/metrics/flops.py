"""Counts the FLOPs of a training step, and knows what a GPU can do: model FLOPs utilisation (MFU).

The count is PaLM's (arXiv:2204.02311, appendix B): 6 per weight and token, 12 per attended pair and channel, forward
and backward; recomputation does not count. Not counted: embedding sums, norms, positions, projections to another width.
"""

import math
import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import ModelConfig, RunConfig
from gpsd_dist.model.gpsd import NextItemModel, RankingModel
from gpsd_dist.model.transformer import ffn_width
from gpsd_dist.parameter_names import module_key

PEAK_BF16_FLOPS_PER_S = {
    "B200": 2250e12,  # NVIDIA Blackwell architecture technical brief, HGX B200
    "H200": 989e12,  # NVIDIA H200 data sheet, SXM
    "H100": 989e12,  # NVIDIA H100 data sheet, SXM; cards are below
    "A100": 312e12,  # NVIDIA A100 data sheet
    "L40S": 362e12,  # NVIDIA L40S data sheet
    "L4": 121e12,  # NVIDIA L4 data sheet
}
"""Dense products (without sparsity) of bf16 with float32 sums, by a word of the device's name."""
_PEAK_OF_CARDS = {"PCIE": {"H100": 756e12, "A100": 312e12}, "NVL": {"H100": 835e12, "H200": 835e12}}
"""Peaks of boards with other clocks and fewer units than the SXM ones, from NVIDIA's data sheets."""


def peak_bf16_flops(device_name: str) -> float | None:
    """Returns the peak in FLOP/s of a GPU by its name; None if it is not listed, or is a part of one (MIG)."""
    words = device_name.upper().replace("-", " ").split()
    if "MIG" in words:
        return None
    peaks = next((cards for board, cards in _PEAK_OF_CARDS.items() if board in words), PEAK_BF16_FLOPS_PER_S)
    return next((peak for part, peak in peaks.items() if part in words), None)


class Work(typing.NamedTuple):
    """Holds what a step computes on."""

    tokens: float  # of histories
    token_keys: float  # pairs of a history token and a token that it attends to
    candidates: float  # 0 in pretraining
    candidate_keys: float  # pairs of a candidate and a token that it attends to
    positions: float = 0.0  # with a next item; 0 in finetuning


def work_of(parts: tuple[Batch, ...]) -> Work:
    """Counts the work of a step's batch, by what the host knows."""
    lengths = [part.packing.history_length_B for part in parts]
    return Work(
        sum(part.packing.num_history_tokens for part in parts),
        sum(int((length_B * (length_B + 1)).sum()) // 2 for length_B in lengths),
        sum(part.packing.num_candidates for part in parts),
        sum(part.packing.candidate_key_count for part in parts),
        sum(len(part.next_item.token_M) for part in parts if part.next_item is not None),
    )


def layer_weights(model: ModelConfig) -> tuple[int, int, int] | None:
    """Counts matrix weights of a layer before and behind its attention, and channels of that; None: no formula."""
    width = model.width
    if model.name == "hstu":
        channels = model.heads * (model.head_width or width // model.heads)
        return 4 * width * channels, channels * width, channels
    behind = {"transformer": 3 * width * ffn_width(width), "sasrec": 2 * width * (model.ffn_width or width)}.get(
        model.name
    )
    return None if behind is None else (3 * width**2, width**2 + behind, width)


def step_flops(run: RunConfig, work: Work, head_weights: int, auxiliary_rows: int) -> float | None:
    """Counts forward and backward; None where there is no formula for the tower or the stage.

    `head_weights`: of the ranking MLPs. `auxiliary_rows`: of the tables that pretraining predicts whole. When ranking,
    histories only give queries, keys and values in the last layer.
    """
    sizes, layers = layer_weights(run.model), run.model.layers
    if sizes is None or run.stage not in ("pretrain", "finetune"):
        return None
    before, behind, channels = sizes
    everything = work.tokens + work.candidates
    total = layers * (6 * (before + behind) * everything + 12 * channels * (work.token_keys + work.candidate_keys))
    if run.stage == "pretrain":
        return total + 6 * run.tables.embedding_dim * work.positions * (run.pretrain.num_negatives + auxiliary_rows)
    return total - 6 * behind * work.tokens - 12 * channels * work.token_keys + 6 * head_weights * work.candidates


class StepFlops:
    """Counts the FLOPs of each step of a run on this rank."""

    def __init__(self, run: RunConfig, model: nn.Module, device: torch.device):
        self.peak: float | None = None
        """FLOP/s of this device; NaN for a GPU that is not listed, None for a CPU."""
        if device.type == "cuda":  # NaN, so that ranks with a GPU record the same names, whichever it is
            self.peak = peak_bf16_flops(torch.cuda.get_device_name(device)) or math.nan
        is_ranking = isinstance(model, RankingModel)
        self._heads = sum(p.numel() for p in model.heads.parameters()) if is_ranking else 0
        tables = model.auxiliary_table.values() if isinstance(model, NextItemModel) else ()
        self._auxiliary = sum(len(model.backbone.embedder.small[module_key(table)].weight) for table in tables)
        self._run = run

    def __call__(self, parts: tuple[Batch, ...]) -> float | None:
        """Counts a step on these micro-batches."""
        return step_flops(self._run, work_of(parts), self._heads, self._auxiliary)
