"""Measures what a tower without a formula keeps for its backward: a forward on fake tensors, which have no memory."""

import contextlib

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from gpsd_dist.assembly import looked_up_tables, meta_model
from gpsd_dist.batch.batch import Bag, Batch, Column, NextItem
from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.dense_parallel import recompute_blocks, tower_of
from gpsd_dist.plan.workload import Workload
from gpsd_dist.schema import Feature, Manifest

_REQUESTS = 64


def tower_bytes(run: RunConfig, manifest: Manifest, step: Workload, device_type: str) -> tuple[float, float]:
    """Estimates (what embedder and tower keep of one micro-batch, gradients inside their backward).

    All requests count as equally long. The gradients are those of the two largest tensors that are kept. On CUDA
    without autocast, or with dropout of attention weights, SASRec keeps pairs as on CPU.
    """
    parts, shown = run.train.micro_batches, 0
    requests, tokens, candidates = (n / parts for n in (step.requests, step.tokens, step.candidates))
    if run.stage != "pretrain":
        shown = max(1, round(candidates / max(requests, 1e-9)))
    history = max(1, round(tokens / max(requests, 1e-9)))
    per_token = run.model.name == "hstu" or (run.model.name == "sasrec" and run.train.bf16 and not run.model.dropout)
    is_kernel = device_type == "cuda" and per_token  # Nothing of pairs is kept: histories of one token tell all

    def measured(recomputes: bool) -> tuple[float, float]:
        if not is_kernel:
            kept = _kept(run, manifest, history, shown, recomputes)
            return requests * kept.num_bytes / _REQUESTS, requests * kept.largest / _REQUESTS
        one = _kept(run, manifest, 1, min(shown, 1), recomputes)
        of_candidate = (_kept(run, manifest, 1, 2, recomputes).num_bytes - one.num_bytes) if shown else 0
        kept_bytes = (tokens * (one.num_bytes - of_candidate) + candidates * of_candidate) / _REQUESTS
        return kept_bytes, (tokens + candidates) * one.largest / _REQUESTS / (1 + min(shown, 1))

    whole, working = measured(False)
    if not run.execution.activation_checkpointing:
        return whole, working
    outside, _ = measured(True)  # without the inputs of blocks, which checkpointing keeps unseen
    inputs = run.model.layers * (tokens + candidates) * 4 * run.model.width
    return outside + inputs + (whole - outside) / run.model.layers, working


def _kept(run: RunConfig, manifest: Manifest, history: int, shown: int, recomputes: bool) -> "Kept":
    """Runs `_REQUESTS` requests forward."""
    sharded = looked_up_tables(run, manifest)
    model = meta_model(run, manifest, sharded)
    # DIEN's GRU reads numbers of its input. It has few weights, so it computes.
    is_fake = run.model.name != "dien"
    with FakeTensorMode(allow_non_fake_inputs=True) if is_fake else contextlib.nullcontext():
        model = model.to_empty(device="cpu")
        batch = stand_in(manifest, np.full(_REQUESTS, history), shown)
        rows = {table.name: torch.empty(1, run.tables.embedding_dim, requires_grad=True) for table in sharded}
        if recomputes:
            recompute_blocks(tower_of(model), has_dropout=run.model.dropout > 0)
        with (kept := Kept(model)), _NormsInFloat32(), torch.autocast("cpu", torch.bfloat16, enabled=run.train.bf16):
            model.backbone(rows, batch, candidates_only=shown > 0)
    if run.train.bf16:  # autocast's copies of weights count as the dense part
        kept.num_bytes -= sum(2 * m.weight.numel() for m in model.backbone.modules() if isinstance(m, nn.Linear))
    return kept


class _NormsInFloat32(TorchFunctionMode):
    """Runs LayerNorm in float32: autocast does so on CUDA, and not on a CPU, which here stands for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.layer_norm:
            args = args[0].float(), *args[1:]
        return func(*args, **(kwargs or {}))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the memory that autograd keeps for the backward of its block: every storage once, without parameters."""

    def __init__(self, model: nn.Module):
        self.num_bytes = 0
        self._sizes: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # A freed storage could pass its address on
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights and storage._cdata not in self._sizes:
            self._alive.append(tensor)
            self._sizes[storage._cdata] = storage.nbytes()
            self.num_bytes += storage.nbytes()
        return tensor

    @property
    def largest(self) -> int:
        """Counts the two largest storages."""
        return sum(sorted(self._sizes.values())[-2:])


def stand_in(manifest: Manifest, lengths: np.ndarray, shown: int, negatives: int = 0) -> Batch:
    """Makes a batch of zeros with these history lengths, ascending, and `shown` candidates each; it has no lookup.

    `negatives`: of the one set that pretraining shares, where every token has a next one; 0 without next items.
    """
    packing = Packing.from_lengths(lengths, np.full(len(lengths), shown))
    sizes = {"history": packing.num_history_tokens, "candidate": packing.num_candidates, "context": len(lengths)}
    columns = {place: {f.name: _column(f, size) for f in manifest.features_in(place)} for place, size in sizes.items()}
    history, candidate, requests = (torch.zeros(size, dtype=torch.int64) for size in sizes.values())
    next_item = None
    if negatives:
        drawn = torch.zeros(1, negatives, dtype=torch.int64)
        targets = {name: value for name, value in columns["history"].items() if isinstance(value, torch.Tensor)}
        next_item = NextItem(history, targets, history, (0, len(history)), drawn, drawn)
    return Batch(
        lookup=None,
        packing=packing,
        history=columns["history"],
        candidate=columns["candidate"],
        context=columns["context"],
        labels={task.name: torch.zeros(packing.num_candidates) for task in manifest.tasks},
        sampling={},
        history_item_T=history,
        candidate_item_C=candidate,
        history_time_s_T=history,
        request_time_s_B=requests,
        user_hash_B=requests,
        source_row_B=requests,
        next_item=next_item,
    )


def _column(feature: Feature, size: int) -> Column:
    if feature.kind == "numerical":
        return torch.zeros(size)
    rows = torch.zeros(size, dtype=torch.int64)
    return Bag(rows, torch.arange(size + 1)) if feature.is_bag else rows
