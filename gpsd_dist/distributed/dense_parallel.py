"""Wraps the dense model for training: activation checkpointing, CUDA graphs, DDP or FSDP2."""

import functools
import logging
import typing

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.model.replaceable import call

log = logging.getLogger(__name__)


def parallelize(model: nn.Module, run: RunConfig, runtime: Runtime) -> nn.Module:
    """Returns the module to call instead of `model` (that of a stage) in training. Collective.

    Parameter names do not change. With fsdp2 the parameters become DTensors, so build the optimizer afterwards.
    `preflight.check_options_against_data` and `assembly.assemble` have refused options that the model does not have.
    """
    if run.execution.activation_checkpointing:
        recompute_blocks(tower_of(model), has_dropout=run.model.dropout > 0)
    if run.execution.cuda_graphs and runtime.device.type != "cuda":
        log.warning("cuda_graphs has no effect without a GPU")
    elif run.execution.cuda_graphs:
        # Compile a function: a compiled module would be a submodule, and so change parameter names. By default torch
        # compiles 8 shapes and runs the others eagerly; batches of ranking may have some dozens.
        torch._dynamo.config.recompile_limit = 64
        model.backbone.call_padded = torch.compile(call, dynamic=False, mode="reduce-overhead")
    if runtime.world_size == 1:
        if run.execution.dense_parallel == "fsdp2":
            log.warning("dense_parallel fsdp2 has no effect on one rank")
        return model
    if run.execution.dense_parallel == "ddp":
        parallel = DistributedDataParallel(model)
        # Buffers come from the data set and never change; by default rank 0 sends them in every step.
        parallel.broadcast_buffers = False
        return parallel
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    # Blocks are gathered in the type that their matrices are rounded to anyway: half the bytes. States between blocks
    # keep their type, and gradients are summed in float32, as with DDP. A CPU may multiply in float32 in spite of
    # `TrainConfig.bf16`, and then the weights have to come in float32.
    is_half = run.train.bf16 and (runtime.device.type == "cuda" or run.execution.matmul_dtype == "bf16")
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if is_half else MixedPrecisionPolicy()
    for block in getattr(tower_of(model), "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Shard what is in no block. It stays gathered between forward and backward, because the loss reads tied weights.
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def tower_of(model: nn.Module) -> typing.Any:
    """Returns the tower inside the dense model of a stage; None if it has none, as a stage of one's own may."""
    return getattr(getattr(model, "backbone", None), "tower", None)


def exchange_gradients(parallel: nn.Module, is_on: bool) -> None:
    """Turns the all-reduce of dense gradients on or off; it is off while micro-batches accumulate."""
    if isinstance(parallel, DistributedDataParallel):
        parallel.require_backward_grad_sync = is_on
    elif isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(is_on)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clips the global gradient norm in place and returns it unclipped, float32 []. Collective with fsdp2."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def compile_tower(tower: nn.Module, *, by_block: bool) -> None:
    """Compiles the tower in place (ModelConfig.compile); parameter names do not change. Call before `parallelize`.

    `by_block` goes with activation checkpointing, which Dynamo (torch 2.13) cannot trace around length buckets.
    """
    if not by_block:
        tower.compile(dynamic=True)
        return
    assert isinstance(tower.blocks, nn.ModuleList), type(tower).__name__
    for block in tower.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def recompute_blocks(tower: nn.Module, has_dropout: bool) -> None:
    """Turns activation checkpointing on: blocks keep their inputs only. Recomputed dropout draws the same numbers."""
    assert hasattr(tower, "blocks"), type(tower).__name__
    for block in tower.blocks:
        # Replace the method of the instance. A wrapping module would change parameter names, which are API.
        options = {"use_reentrant": False, "preserve_rng_state": has_dropout}
        block.forward = functools.partial(checkpoint, block.forward, **options)
