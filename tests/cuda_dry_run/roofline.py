"""Counts what a training step on fake CUDA tensors computes, reads, writes and keeps; holds it against `plan`.

    python -m tests.cuda_dry_run.roofline

prints the table of docs/performance.md. A step has 70,094 history tokens of 1,170 requests and 4096 shared negatives,
as in the GPU suite.
"""

# ruff: noqa: I001
from tests.cuda_dry_run import dry_run  # loads the shim: before torch

import contextlib
import dataclasses
import typing
import unittest.mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpsd_dist.assembly import looked_up_tables
from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.padding import pad_packing
from gpsd_dist.batch.transfer import map_tensors, to_device
from gpsd_dist.data.micro_batch import with_targets
from gpsd_dist.metrics.flops import step_flops, work_of
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.dense_parallel import clip_gradients
from gpsd_dist.model import transformer
from gpsd_dist.optim import dense_optimizer, named_state
from gpsd_dist.plan.estimate import model_size
from gpsd_dist.plan.measured import Kept, stand_in, tower_bytes
from gpsd_dist.plan.memory import transformer_bytes
from gpsd_dist.plan.workload import Workload
from gpsd_dist.schema import Manifest
from gpsd_dist.stages.registry import find
from tests.helpers.synthetic import make_manifest
from tests.integration.tiny_data import tiny_run

UNIQUE_ROWS = 40_000
EMBED, TOWER, LOSS, CLIP, UPDATE = "embedding", "tower", "head + loss", "clipping", "update"
GRAPH = "graph"  # with `cuda_graphs`: what is captured, in the place of TOWER and LOSS
PEAK_FLOPS_PER_S, PEAK_BYTES_PER_S = 790e12, 4.3e12
"""80 % of an H200's data sheet in bf16, and 90 % of its memory bandwidth: what well-made kernels reach."""
GRAPHS = {"token_multiple": 1024, "cuda_graphs": True}
SHOWN = {"l4h256a4": 0, "l4h256a4/ranking": 2}  # Candidates a request
TRAINED = {"l24h1024a16": (24, 1024, 16), "l4h256a4": (4, 256, 4)}


@dataclasses.dataclass
class Counted:
    """What one step does."""

    product_flops: float = 0.0
    product_bytes: float = 0.0
    other_bytes: float = 0.0
    """Every operation that is no view reads its inputs and writes its outputs once."""
    operations: int = 0
    """What is launched, but for operations over lists of tensors, which a CPU build takes apart."""
    of_parts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Operations of each part of the step, forward and backward together."""
    part: str = ""
    kept_bytes: float = 0.0  # by embedder and tower
    planned_flops: float = 0.0  # without attention, whose products hide in an operation of their own
    planned_kept_bytes: float = 0.0


class Count(TorchDispatchMode):
    """Adds up bytes and FLOPs of what is dispatched."""

    def __init__(self, counted: Counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        is_idle = func.is_view or func.namespace == "prim" or "empty" in func._overloadpacket.__name__
        if is_idle or not any(tensor.is_cuda for tensor in (*inputs, *outputs)):
            return out
        self.counted.operations += 1
        self.counted.of_parts[self.counted.part] = self.counted.of_parts.get(self.counted.part, 0) + 1
        moved = sum(_bytes(tensor) for tensor in {id(t): t for t in (*inputs, *outputs)}.values())
        if func._overloadpacket.__name__ in dry_run._PRODUCTS:
            left = args[-2]
            self.counted.product_flops += 2 * left.shape[-1] * outputs[0].numel()
            self.counted.product_bytes += moved
        else:
            self.counted.other_bytes += moved
        return out


@torch.library.custom_op("gpsd_tests::rms_norm", mutates_args=())
def _norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for `_fused_rms_norm`, one kernel that a CPU build takes apart. Returns 1 / rms, too."""
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


@torch.library.custom_op("gpsd_tests::rms_norm_backward", mutates_args=())
def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


_norm.register_fake(lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:-1])))
_norm_backward.register_fake(lambda grad, x, scale, weight: (torch.empty_like(x), torch.empty_like(weight)))
_norm.register_autograd(lambda ctx, grad, _: _norm_backward(grad, *ctx.saved_tensors), setup_context=_keep)


@torch.library.custom_op("gpsd_tests::silu", mutates_args=())
def _silu(x: torch.Tensor) -> torch.Tensor:
    """Stands for SiLU, whose backward is one kernel in a CUDA build, too."""
    return torch.empty_like(x)


@torch.library.custom_op("gpsd_tests::silu_backward", mutates_args=())
def _silu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_silu.register_fake(torch.empty_like)
_silu_backward.register_fake(lambda grad, x: torch.empty_like(x))
_silu.register_autograd(
    lambda ctx, grad: _silu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _tensors(value: typing.Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for entry in value for tensor in _tensors(entry)] if isinstance(value, list | tuple) else []


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # less where it is expanded


@contextlib.contextmanager
def _named_parts(model: torch.nn.Module, counted: Counted) -> typing.Iterator[None]:
    """Tells `counted` where the tower begins and ends, forward and backward."""
    forward = model.backbone.tower.forward

    def named(part: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor.register_hook(lambda _: setattr(counted, "part", part))
        return tensor

    def tower(x, *args, **kwargs):
        counted.part = TOWER
        out = forward(named(EMBED, x), *args, **kwargs)
        counted.part = LOSS
        return named(TOWER, out)

    with unittest.mock.patch.object(model.backbone.tower, "forward", tower):
        yield


class _Captured(torch.autograd.Function):
    """Runs a function and its backward where a graph would be replayed; what is around it is launched one by one."""

    @staticmethod
    def forward(ctx, function, counted, where, others, *tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        before, counted.part = counted.part, GRAPH
        with torch.enable_grad():
            out = function(*(leaves[where.index(i)] if i in where else other for i, other in enumerate(others)))
        ctx.kept, counted.part = (counted, leaves, out), before
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        counted, leaves, out = ctx.kept
        before, counted.part = counted.part, GRAPH
        torch.autograd.backward(out, grad)
        counted.part = before
        return None, None, None, None, *(leaf.grad for leaf in leaves)


def _captured(counted: Counted) -> typing.Callable:
    """Stands for `torch.compile(call)` with CUDA graphs."""

    def call(function, *values):
        where = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and value.requires_grad]
        return _Captured.apply(function, counted, where, values, *(values[i] for i in where))

    return call


def padded(run: RunConfig, batch: Batch) -> Batch:
    """Pads a batch whose history tokens all predict, with one set of negatives."""
    geometry = pad_packing(batch.packing, run.execution.token_multiple, batch.packing.max_history_length)
    geometry = with_targets(geometry, batch.next_item) if batch.next_item else geometry
    return dataclasses.replace(batch, padded=geometry)


def count_step(run: RunConfig, manifest: Manifest, lengths: np.ndarray, shown: int, negatives: int) -> Counted:
    """Counts one step of the dense part: forward, backward, clip, update. `lengths` ascend."""
    counted, sharded = Counted(), looked_up_tables(run, manifest)
    has_norm = unittest.mock.patch.object(torch.nn.RMSNorm, "forward", lambda self, x: _norm(x, self.weight)[0])
    # In pretraining the tower does not run on the last token of a history, which is only predicted.
    host = stand_in(manifest, lengths if shown else lengths - 1, shown, negatives)
    host = padded(run, host) if run.execution.cuda_graphs else host
    has_silu = unittest.mock.patch("torch.nn.functional.silu", _silu)
    with FakeTensorMode() as mode, dry_run.on_fake_cuda(set()), has_norm, has_silu:
        stage = find(run.stage)(run, manifest)
        with dry_run.CUDA:
            model = stage.model(sharded)
        shape = UNIQUE_ROWS, run.tables.embedding_dim
        rows = {table.name: torch.empty(*shape, device="cuda", requires_grad=True) for table in sharded}
        optimizer = dense_optimizer(model, run.dense)
        named_state(optimizer, model)  # made in the first step alone
        if run.execution.cuda_graphs:
            model.backbone.call_padded = _captured(counted)
        batch = to_device(map_tensors(host, mode.from_tensor, {}), dry_run.CUDA)
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=run.train.bf16)
        with (kept := Kept(model)), autocast:
            model.backbone(rows, batch, candidates_only=shown > 0)
        named = contextlib.nullcontext() if run.execution.cuda_graphs else _named_parts(model, counted)
        with Count(counted), named:
            counted.part = EMBED
            with autocast:
                loss = stage.loss_sums(model, rows, batch).sum()
            loss.backward()
            counted.part = CLIP
            clip_gradients(list(model.parameters()), 1.0)
            counted.part = UPDATE
            optimizer.step()
    size, tokens = model_size(run, manifest), int(lengths.sum())
    context = float((lengths * (lengths + 1) / 2).sum() / tokens)
    of_tables = dict.fromkeys(rows, float(UNIQUE_ROWS))
    step = Workload(len(lengths), tokens, len(lengths) * shown, context, negatives, of_tables)
    seen, is_formula = step if shown else step.without_last(), run.model.name == "transformer"
    tower, _ = transformer_bytes(run, seen, "cuda") if is_formula else tower_bytes(run, manifest, seen, "cuda")
    # autocast's copies of the weights count as the dense part
    matrices = size.matrix_parameters - size.head_parameters
    counted.kept_bytes, counted.planned_kept_bytes = kept.num_bytes - 2 * matrices * run.train.bf16, tower
    work = work_of((host,))._replace(token_keys=0.0, candidate_keys=0.0)
    counted.planned_flops = step_flops(run, work, size.head_parameters, size.auxiliary_rows) or 0.0
    return counted


def trained(size: str, shown: int = 0, **changes) -> Counted:
    """Counts a step of the GPU suite: pretraining, or ranking with `shown` candidates a request."""
    layers, width, heads = TRAINED[size]
    run = tiny_run(
        "finetune" if shown else "pretrain",
        "x",
        "y",
        model={"layers": layers, "width": width, "heads": heads},
        tables={"embedding_dim": width},
        pretrain={"num_negative_groups": 1, "num_negatives": 4096},
        train={"bf16": True},
        **changes,
    )
    lengths = np.sort(np.r_[np.full(1064, 60), np.full(106, 59)])
    assert lengths.sum() == 70_094
    manifest = make_manifest(table_rows={"item": 10**6, "tag": 10**5})
    return count_step(run, manifest, lengths, shown, 0 if shown else 4096)


def towers() -> dict[str, Counted]:
    """Counts small steps of the towers whose attention has a kernel, in both stages."""
    found, manifest = {}, make_manifest(table_rows={"item": 1000, "tag": 1000})
    for name in ("transformer", "sasrec", "hstu"):
        for stage, shown in (("pretrain", 0), ("finetune", 4)):
            model = {"name": name, "layers": 3, "width": 64, "heads": 2, "max_positions": 50, "time_bias": True}
            if name != "hstu":
                del model["time_bias"]
            run = tiny_run(stage, "x", "y", model=model, tables={"embedding_dim": 64}, train={"bf16": True})
            run = dataclasses.replace(run, pretrain=dataclasses.replace(run.pretrain, num_negative_groups=1))
            found[f"{stage}/{name}"] = count_step(run, manifest, np.full(256, 40), shown, 0 if shown else 16)
    return found


def results() -> dict[str, dict]:
    """Counts what the tests look at: L4H256A4, the same with one pass more, and small towers."""
    found = towers() | {"l4h256a4": trained("l4h256a4"), "l4h256a4/ranking": trained("l4h256a4", shown=2)}
    found |= {f"{name}/graphs": trained("l4h256a4", n, execution=GRAPHS) for name, n in SHOWN.items()}
    swiglu = transformer.swiglu
    with unittest.mock.patch.object(transformer, "swiglu", lambda x_SD, *rest: swiglu(x_SD * 1.0, *rest)):
        found["planted pass"] = trained("l4h256a4")
    return {f"roofline {name}": dataclasses.asdict(counted) for name, counted in found.items()}


def main() -> None:
    for size, (layers, width, _) in TRAINED.items():
        c = trained(size)
        attention = layers * 12 * width * (70_094 - 1_170) * 30.0
        products_s = (c.product_flops + attention) / PEAK_FLOPS_PER_S
        print(
            f"{size}: {(c.product_flops + attention) / 1e12:.2f} TFLOP, products {1e3 * products_s:.1f} ms, other "
            f"{c.other_bytes / 1e9:.1f} GB = {1e3 * c.other_bytes / PEAK_BYTES_PER_S:.1f} ms, kept "
            f"{c.kept_bytes / 2**30:.1f} GiB (plan {c.planned_kept_bytes / 2**30:.1f}), {c.operations} operations; "
            f"plan's FLOPs / counted {c.planned_flops / c.product_flops:.4f}; {c.of_parts}"
        )
    for name, shown in SHOWN.items():
        for execution in ({}, GRAPHS):
            print(name, "with graphs" if execution else "", trained("l4h256a4", shown, execution=execution).of_parts)
    for name, c in towers().items():
        print(name, c)


if __name__ == "__main__":
    main()
