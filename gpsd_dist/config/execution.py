"""Holds the options of speed, memory and exchange. What is computed is in `training.py` and `model.py`."""

import collections.abc
import dataclasses
import typing

from gpsd_dist.validation import MAY_CHANGE, AtLeast0, checked, one_of

PIPELINES = ("plain", "sparse_dist")
DENSE_PARALLEL = ("ddp", "fsdp2")
EXCHANGE_TYPES = ("fp32", "fp16", "bf16")
MATMUL_DTYPES = ("auto", "fp32", "bf16")


def _graphs_need_few_shapes(execution: "ExecutionConfig") -> collections.abc.Iterator[str]:
    """A CUDA graph is recorded for one shape: without padding every batch would need one of its own."""
    if execution.cuda_graphs and not execution.token_multiple:
        yield "cuda_graphs needs few shapes: set token_multiple, to 1024 for example"


def _graphs_are_for_small_towers(execution: "ExecutionConfig") -> collections.abc.Iterator[str]:
    """Graphs hide the time of launches, which only small towers notice; a graph cannot gather weights or recompute."""
    if execution.cuda_graphs and (execution.activation_checkpointing or execution.dense_parallel == "fsdp2"):
        yield "cuda_graphs is for small towers, activation_checkpointing and fsdp2 are for large ones"


@checked(rules=(_graphs_need_few_shapes, _graphs_are_for_small_towers))
class ExecutionConfig:
    """Says how the training step is executed."""

    activation_checkpointing: bool = dataclasses.field(default=False, metadata=MAY_CHANGE)
    """Keep only the input of every tower block and compute the rest again in the backward: about a third more FLOPs,
    the same bits. For long histories. transformer, sasrec, hstu."""
    exchange_forward: typing.Annotated[str, one_of(EXCHANGE_TYPES)] = "fp32"
    """fp32 | fp16 | bf16: how table rows travel from the rank that has them. Less than fp32 changes results."""
    exchange_backward: typing.Annotated[str, one_of(EXCHANGE_TYPES)] = "fp32"
    """fp32 | fp16 | bf16: how gradients of rows travel back. fp16: scaled by 1024, so that 64 is the largest."""
    pipeline: typing.Annotated[str, one_of(PIPELINES)] = dataclasses.field(default="plain", metadata=MAY_CHANGE)
    """plain | sparse_dist: while a step computes, TorchRec copies the next batch to the device and exchanges its
    indices. The same bits; on CPU there is nothing to gain."""
    dense_parallel: typing.Annotated[str, one_of(DENSE_PARALLEL)] = dataclasses.field(
        default="ddp", metadata=MAY_CHANGE
    )
    """ddp | fsdp2: every rank keeps the whole dense part, or a part of its weights, gradients and optimizer state,
    which are gathered block by block as they are needed (fully_shard). For towers that do not fit otherwise."""
    token_multiple: AtLeast0 = dataclasses.field(default=0, metadata=MAY_CHANGE)
    """transformer: the tower's history tokens and candidates are padded to a multiple of this in training, so that it
    meets few shapes; 0: no padding. With --gin.DataConfig.global_batch_tokens the number of tokens hardly varies."""
    cuda_graphs: bool = dataclasses.field(default=False, metadata=MAY_CHANGE)
    """Compile tower, head and losses for each padded shape and replay them as a CUDA graph: for small towers, whose
    kernels take less time than their launch. Losses stay outside where PretrainConfig.negatives_per is not "group",
    with item_bias, recent_days or log_q, and where items are managed. Needs token_multiple, TrainConfig.bf16 (only
    flash attention has few shapes) and a batch in one part (micro_batches); not with options for large towers. On CPU:
    pads the same, and compiles nothing."""
    matmul_dtype: typing.Annotated[str, one_of(MATMUL_DTYPES)] = dataclasses.field(default="auto", metadata=MAY_CHANGE)
    """auto | fp32 | bf16: operands of the dense part's products on a CPU. bf16 needs AVX512_BF16 or AMX and leaves
    logits, norms, residuals and optimizer in float32. auto: fp32, or bf16 with TrainConfig.bf16. Settled at the start
    and recorded; a resumed run goes on with what was recorded. On a GPU: nothing, use TrainConfig.bf16."""


DEFAULT = ExecutionConfig()
