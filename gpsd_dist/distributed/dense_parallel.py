"""What is put around the dense model from outside: recomputed activations, replication or sharding over ranks."""

import functools
import logging

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.runtime import Runtime

log = logging.getLogger(__name__)


def parallelize(model: nn.Module, run: RunConfig, runtime: Runtime) -> nn.Module:
    """What to call instead of `model` (NextItemModel or RankingModel) in training. Collective.

    Names of parameters stay those of `model`; with fsdp2 they are DTensors afterwards, so build the optimizer later.
    Options that the model does not have: `preflight.check_options_against_data` refuses them.
    """
    if run.execution.activation_checkpointing:
        recompute_blocks(model.backbone.tower, has_dropout=run.model.dropout > 0)
    if run.execution.cuda_graphs and runtime.device.type != "cuda":
        log.warning("cuda_graphs has no effect without a GPU")
    elif run.execution.cuda_graphs:
        # The function, not the module: a module set as an attribute would change parameter names.
        tower = model.backbone.tower
        model.backbone.call_padded = torch.compile(tower.forward, dynamic=False, mode="reduce-overhead")
    if runtime.world_size == 1:
        if run.execution.dense_parallel == "fsdp2":
            log.warning("dense_parallel fsdp2 has no effect on one rank")
        return model
    if run.execution.dense_parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    for block in getattr(model.backbone.tower, "blocks", ()):
        fully_shard(block, mesh=mesh)
    # All that is in no block. It stays gathered between forward and backward: the loss uses tied weights from it.
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def exchange_gradients(parallel: nn.Module, is_on: bool) -> None:
    """Whether the next backward of what `parallelize` gave ends in an exchange; off while parts of a batch add up."""
    if isinstance(parallel, DistributedDataParallel):
        parallel.require_backward_grad_sync = is_on
    elif isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(is_on)


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clips the global norm in place and returns what it was, float32 []. Collective where parameters are sharded."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def compile_tower(tower: nn.Module, *, by_block: bool) -> None:
    """`ModelConfig.compile`, in place: parameter names stay. Before `parallelize`.

    `by_block`: where blocks are computed again; Dynamo (torch 2.13) cannot trace that together with length buckets.
    """
    if not by_block:
        tower.compile(dynamic=True)
        return
    assert isinstance(tower.blocks, nn.ModuleList), type(tower).__name__
    for block in tower.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def recompute_blocks(tower: nn.Module, has_dropout: bool) -> None:
    """From now on a block of the tower keeps its inputs alone. Recomputed dropout draws the same numbers."""
    assert hasattr(tower, "blocks"), type(tower).__name__
    for block in tower.blocks:
        # on the instance, not a wrapping module: parameter names are API
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=has_dropout
        )
