"""Builds everything that can be timed: the product, the baseline, and each with one of its parts switched.

`VARIANTS` is the list. A side runs in a process of its own (`remote.py`), so a switch may replace a function for good,
and neither side inherits what the other's memory allocator or caches have done.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import typing

import numpy as np
import pyarrow as pa
import torch

from benchmarks.datasets import BenchData
from benchmarks.padded_baseline import PaddedBaseline, PaddedLoader
from benchmarks.product import Evaluation, Product, Size, run_config
from gpsd_dist.batch import packing
from gpsd_dist.config import PretrainConfig
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.data import collate, distinct
from gpsd_dist.distributed import allocator
from gpsd_dist.distributed import runtime as runtime_module
from gpsd_dist.model import transformer
from gpsd_dist.model.ops import attention, row_attention, swiglu
from gpsd_dist.stages import losses

NUM_NEGATIVES = 4096
_GROUPS = 8

VARIANTS = {
    "baseline": "padded tower, negatives per sequence, dense AdamW on the item table, Python loader",
    "baseline + packed tower": "tokens without padding, attention in shared rows",
    "baseline + shared negatives": f"{_GROUPS} sets per batch instead of one per sequence",
    "baseline + columnar loader": "padded batches made from whole Arrow columns",
    "baseline + kept memory": "an option of the C library, no part of the scheme: freed memory stays in the process",
    "product": "everything on",
    "product, 8 x 1024 negatives": "the default of the product instead of 8 x 4096",
    "product + bf16 operands": "operands of products in bfloat16: linear layers, SwiGLU, gradients of the loss",
    "product + frozen item table": "what ST&SF and FT&SF train",
    "product + frozen item table in fp16": "kept in half precision",
    "product, evaluating": "scores the same rows, metrics included; nothing is trained",
    "product, evaluating - blocks": "SwiGLU of a whole batch at once, so that hidden values leave the cache",
    "product - shared rows": "attention in one row per request, by length buckets",
    "product - candidates alone": "histories attend in the last ranking layer too, and their output is thrown away",
    "product - folded norms": "torch's RMSNorm in front of every linear layer",
    "product - left-out token": "the last token of every history goes through the tower, though nothing is predicted",
    "product - shared negatives": f"{NUM_NEGATIVES} negatives per sequence",
    "product - fused softmax loss": "sampled softmax by autograd instead of gradients made in the forward",
    "product - deduplicated lookup": "every index looked up, exchanged and updated on its own",
    "product - columnar loader": "rows pass through Python objects",
    "product - kept memory": "freed memory goes back to the system",
    "product - huge pages": "memory in pages of 4 KiB, as without a launcher",
}
PRETRAIN_ONLY = {
    "baseline + shared negatives",
    "product, 8 x 1024 negatives",
    "product - left-out token",
    "product - shared negatives",
    "product - fused softmax loss",
}
FINETUNE_ONLY = {name for name in VARIANTS if any(word in name for word in ("frozen", "candidates", "evaluating"))}


SIZES = {
    "h64": Size(4, 64, 4),
    "h128": Size(4, 128, 4),
    "h256": Size(4, 256, 4),
    "l24h1024a16": Size(24, 1024, 16),
}


@dataclasses.dataclass(frozen=True)
class SideSpec:
    """Holds everything that a process needs to build a side."""

    variant: str
    data: BenchData
    size: Size
    batch_rows: int
    folder: pathlib.Path  # own folder of a product


class Side(typing.Protocol):
    """Is one of the two that are compared."""

    def run_steps(self, count: int) -> int:
        """Trains; returns real tokens."""


def variants_of(kind: str) -> tuple[str, ...]:
    """Lists the variants that make sense for a kind of training."""
    other = FINETUNE_ONLY if kind == "pretrain" else PRETRAIN_ONLY
    return tuple(name for name in VARIANTS if name not in other)


@contextlib.contextmanager
def opened(spec: SideSpec) -> typing.Iterator[Side]:
    """Builds a side in this process, which must not have run another one."""
    if spec.variant not in VARIANTS:
        raise ValueError(f"variant {spec.variant!r} is not one of {list(VARIANTS)}")
    if spec.variant.startswith("baseline"):
        yield _baseline(spec)
        return
    switch = spec.variant.removeprefix("product").strip(" +-,")
    _switch(switch)
    with runtime_module.process_group(timeout_s=600) as runtime:
        product = Product(_product_config(spec, switch), runtime)
        if switch == "columnar loader":
            _pass_through_python(product)
        yield Evaluation(product, spec.data.split) if switch.startswith("evaluating") else product
        product.close()


def _baseline(spec: SideSpec) -> PaddedBaseline:
    is_pretraining = spec.data.split == "pretrain"
    options = spec.variant.removeprefix("baseline").strip(" +")
    if options == "kept memory":
        allocator.keep_freed_memory()
    loader = PaddedLoader(
        spec.data.data_dir,
        spec.data.manifest,
        spec.data.split,
        batch_rows=spec.batch_rows,
        num_negatives=NUM_NEGATIVES if is_pretraining else 0,
        num_negative_groups=_GROUPS if options == "shared negatives" else 0,
        is_columnar=options == "columnar loader",
    )
    size = spec.size
    return PaddedBaseline(
        loader,
        spec.data.manifest,
        layers=size.layers,
        width=size.width,
        heads=size.heads,
        is_packed=options == "packed tower",
    )


def _product_config(spec: SideSpec, switch: str):
    negatives = 1024 if switch == "8 x 1024 negatives" else NUM_NEGATIVES
    per = "request" if switch == "shared negatives" else "group"
    pretrain = PretrainConfig(num_negatives=negatives, negatives_per=per, auxiliary=("category",))
    run = run_config(spec.data, spec.size, spec.batch_rows, pretrain, spec.folder)
    if switch == "bf16 operands":
        run = dataclasses.replace(run, execution=ExecutionConfig(matmul_dtype="bf16"))
    if switch.startswith("frozen item table"):
        _, _, dtype = switch.partition(" in ")
        run = dataclasses.replace(
            run,
            strategy="ST_SF",
            init_checkpoint="not loaded: time does not depend on weights",
            tables=dataclasses.replace(run.tables, frozen_dtype=dtype or "fp32"),
        )
    return run


def _switch(name: str) -> None:
    """Turns one part of the product off in this process."""
    if name == "shared rows":
        packing.plan_rows = lambda *lengths: None
    elif name == "candidates alone":
        attention._by_length = _with_histories
    elif name == "folded norms":
        transformer.normed_linear = lambda x, norm, linear: linear(norm(x))
        transformer.normed = lambda x, norm: norm(x)
        swiglu.folded = lambda x, norm, linear: (norm(x), linear.weight)
    elif name == "left-out token":
        collate.without_last = lambda offsets: (np.ones(int(offsets[-1]), bool), np.diff(offsets))
    elif name == "fused softmax loss":
        losses._SampledSoftmax = _PlainSoftmax
    elif name == "deduplicated lookup":
        distinct._distinct = _repeated
    elif name == "evaluating - blocks":
        swiglu._SCORED_TOKENS = 1 << 40
    elif name == "kept memory":
        runtime_module.keep_freed_memory = lambda: False
        assert allocator.keep_freed_memory  # still there, not called


def _with_histories(
    qkv_S3HK: torch.Tensor, rows_of: packing.Packing, candidates_only: bool, dropout: float
) -> torch.Tensor:
    """Replaces `attention._by_length`: lets all tokens attend in shared rows."""
    first = rows_of.num_history_tokens if candidates_only else 0
    if rows_of.rows is None:
        return attention.bucketed(qkv_S3HK, rows_of, False, dropout)[first:]
    return row_attention.in_rows(qkv_S3HK, rows_of.rows, dropout)[first:]


def _repeated(parts: list[distinct.Wanted], num_rows: int) -> np.ndarray:
    """Replaces `distinct._distinct`: returns every value as often as it occurs."""
    values = distinct._joined(parts)
    distinct._cut(parts, np.arange(len(values)))
    return values


def _pass_through_python(product: Product) -> None:
    loader = product.trainer.loader
    columnar = loader._make_batch
    loader._make_batch = lambda rows, key: columnar(pa.Table.from_pylist(rows.to_pylist(), schema=rows.schema), key)


class _PlainSoftmax:
    """Computes `losses._SampledSoftmax` one group after the other, with gradients by autograd."""

    @staticmethod
    def apply(query_ME, unit_UE, indices, group_offsets, *_) -> torch.Tensor:
        target_row_M, target_item_M, negative_row_GN, negative_item_GN = indices
        total = query_ME.new_zeros(())
        for group, (start, stop) in enumerate(itertools.pairwise(group_offsets)):
            query, item = query_ME[start:stop], target_item_M[start:stop, None]
            positive = (query * unit_UE[target_row_M[start:stop]]).sum(-1, keepdim=True)
            logits = query @ unit_UE[negative_row_GN[group]].t()
            logits = logits.masked_fill(item == negative_item_GN[group], float("-inf"))
            total = total - torch.cat((positive, logits), -1).log_softmax(-1)[:, 0].sum()
        return total
