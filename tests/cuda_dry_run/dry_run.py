"""Runs training steps and scoring passes on *fake* CUDA tensors, with torch's CPU build: devices, dtypes, host waits.

    python -m tests.cuda_dry_run.dry_run RESULTS.json [case ...]

The step is the product's own `TrainingStep`, and so are what copies a checkpoint to the host and the loop of a
validation. Replaced are the tables' rows (TorchRec), launches of Triton kernels, cuDNN's GRU, pinning, and for two
ranks what `parallel.py` says. FakeTensorMode raises for operands on different devices and for what needs a number on
the host (`.item()`, `bool(tensor)`, `nonzero`, boolean masks); `Watch` adds copies that wait, and counts products by
dtype. What may wait, and needs numbers for it, is in `evaluated.py`. Neither sees races, NCCL and FBGEMM's kernels.
"""

# ruff: noqa: E402, I001
from tests.cuda_dry_run.load_shim import load_shim

load_shim()

import contextlib
import dataclasses
import inspect
import json
import pathlib
import sys
import tempfile
import traceback
import typing
import unittest.mock
import warnings

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from gpsd_dist import optim
from gpsd_dist.assembly import looked_up_tables
from gpsd_dist.batch import transfer
from gpsd_dist.checkpoint import files
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.metrics.profiling import StepProfiler
from gpsd_dist.model.heads import RankingHeads
from gpsd_dist.model.number_buckets import NumberBuckets
from gpsd_dist.model.ops import hstu_attention, hstu_triton
from gpsd_dist.optim import named_state
from gpsd_dist.schema import Manifest, write_manifest
from gpsd_dist.stages.registry import find
from gpsd_dist.stages.stage import Components
from gpsd_dist.tables.id_remapping import IdRemapper
from gpsd_dist.training_step import TrainingStep
from gpsd_dist.trainer import Trainer
from tests.cuda_dry_run.cases import BF16, CASES, PLANTS, SAVED, SCORED, STEPS_TWICE
from tests.cuda_dry_run import parallel
from tests.cuda_dry_run.parallel import Stream, two_ranks
from tests.integration.tiny_data import tiny_run, write_tiny_data

CUDA = torch.device("cuda", 0)
_PINNED = "_is_pinned_by_dry_run"
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Watch(TorchDispatchMode):
    """Notes copies that make the host wait and indices left on the host; counts matrix products by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: set[str] = set()
        self.copies = 0  # from host to device
        self.products: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name == "_to_copy":
            self._copied(args[0], out, kwargs.get("non_blocking", False))
        elif name == "copy_":
            self._copied(args[1], args[0], (args[2:] or [kwargs.get("non_blocking", False)])[0])
        elif name in _INDEXING:
            indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
            if args[0].is_cuda and any(not i.is_cuda for i in indices):
                self._note("index on the host")
            if args[0].is_cuda and any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self._note("index by a mask")  # waits for its size; writing by it does not raise here
        elif name.startswith(("_foreach", "_fused")):
            # Fake tensors in lists may be on several devices; on CUDA they may not.
            listed = [tensor for tensors in args if isinstance(tensors, list | tuple) for tensor in tensors]
            if len({tensor.device for tensor in listed if isinstance(tensor, torch.Tensor)}) > 1:
                self._note(f"{name} on cuda:0 and on cpu")
        elif name in _PRODUCTS and out.is_cuda:
            dtype = str(out.dtype).removeprefix("torch.")
            self.products[dtype] = self.products.get(dtype, 0) + 1
        return out

    def _copied(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        if source.device.type == target.device.type:
            return
        if source.is_cuda:
            if not (non_blocking and getattr(target, _PINNED, False)):
                self._note(f"device to host, {tuple(source.shape)}")
            return
        self.copies += 1
        if not (non_blocking and getattr(source, _PINNED, False)):
            self._note(f"host to device, {tuple(source.shape)}, " + ("not pinned" if non_blocking else "blocking"))

    def _note(self, what: str) -> None:
        self.waits.add(f"{what} at {place(traceback.extract_stack())}")


def place(stack) -> str:
    """The last lines of the product on a stack."""
    frames = [frame for frame in stack if "/gpsd_dist/" in frame.filename or "planted" in frame.name]
    return " <- ".join(f"{pathlib.Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:]))


class FakeTables:
    """Rows [U, E] on the device instead of TorchRec's."""

    def __init__(self, width: int, frozen: tuple[str, ...]):
        self.width, self.frozen = width, frozen

    def __call__(self, lookup) -> dict[str, torch.Tensor]:
        assert lookup.values().is_cuda, lookup.values().device
        rows = {}
        for name, size in zip(lookup.keys(), lookup.length_per_key(), strict=True):
            row = torch.empty(size, self.width, device=CUDA, requires_grad=name not in self.frozen)
            rows[name] = row * 1.0 if row.requires_grad else row
        return rows

    def set_learning_rate(self, lr: float) -> None:
        """The tables' optimizer is not part of this."""


class Launch:
    """Stands for a Triton kernel: `kernel[grid](...)` checks what a launch would be given."""

    def __init__(self, kernel, launched: set[str]):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        assert all(isinstance(n, int) and n > 0 for n in grid) and all(n <= 65535 for n in grid[1:]), grid

        def call(*args, **options):
            names = [name for name in self.kernel.arg_names if name not in options]
            assert len(names) == len(args), (names, len(args))
            for name, value in zip(names, args, strict=True):
                if isinstance(value, torch.Tensor):
                    assert value.is_cuda and value.is_contiguous(), (name, value.device)
            self.launched.add(self.kernel.__name__)

        return call


def host_block(layout: list) -> list[torch.Tensor]:
    """Stands for `files.host_block`, whose memory is page-locked afterwards."""
    block = [torch.empty(shape, dtype=dtype) for shape, dtype in layout]
    for tensor in block:
        setattr(tensor, _PINNED, True)
    return block


@contextlib.contextmanager
def on_fake_cuda(launched: set[str]) -> typing.Iterator[None]:
    """Replaces what would ask a driver, or a number of a tensor."""

    def pin(tensor, *_):
        copy = tensor.clone()
        setattr(copy, _PINNED, True)
        return copy

    def gru(self, packed, *_):
        # cuDNN reads the number of living sequences per step on the host, where it is; a fake tensor has no numbers.
        is_packed = isinstance(packed, torch.nn.utils.rnn.PackedSequence)
        x = packed.data if is_packed else packed
        assert x.is_cuda and not (is_packed and packed.batch_sizes.is_cuda)
        # autocast hands cuDNN float16, whatever it was told
        assert x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda"), "a GRU under autocast"
        out = x[:, : self.hidden_size] * sum(p.sum() for p in self.parameters())
        return (packed._replace(data=out) if is_packed else out), None

    patches = [
        unittest.mock.patch.object(torch.Tensor, "pin_memory", pin),
        unittest.mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor),  # asks for a number
        unittest.mock.patch.object(torch.nn.GRU, "forward", gru),
        # A compiler would ask for the device's properties; `tests/cuda_compile` has it write its code.
        unittest.mock.patch("torch.compile", lambda function, **_: function),
        unittest.mock.patch("torch.compiler.cudagraph_mark_step_begin", lambda: None),
        # Autocast switches itself off where there is no CUDA: a dry run of bf16 would be one of float32.
        unittest.mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        unittest.mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
        unittest.mock.patch("torch.cuda.current_stream", lambda *_: Stream()),
        unittest.mock.patch("torch.cuda.cudart", lambda: unittest.mock.Mock(cudaHostRegister=lambda *_: 0)),
        unittest.mock.patch.object(files, "host_block", host_block),
        # Operations over lists are taken for tensors of torch's own types alone.
        unittest.mock.patch.object(_foreach_utils, "_foreach_supported_types", [torch.nn.Parameter, FakeTensor]),
        unittest.mock.patch.object(hstu_attention, "_has_triton", lambda: True),
        unittest.mock.patch.object(hstu_triton, "_generation", lambda _: 9),
    ]
    for name in ("_forward", "_backward_queries", "_backward_keys", "_fill_buckets"):
        patches.append(unittest.mock.patch.object(hstu_triton, name, Launch(getattr(hstu_triton, name), launched)))
    with contextlib.ExitStack() as stack:
        for entry in patches:
            stack.enter_context(entry)
        yield


@dataclasses.dataclass
class Result:
    """What one case showed."""

    error: str = ""
    waits: list[str] = dataclasses.field(default_factory=list)
    products: dict[str, int] = dataclasses.field(default_factory=dict)
    without_gradient: list[str] = dataclasses.field(default_factory=list)
    launched: list[str] = dataclasses.field(default_factory=list)
    copies: list[int] = dataclasses.field(default_factory=list)  # from host to device, by step
    staging_syncs: int = 0  # Waits of a checkpoint's copy to the host


def page_locked(num_bytes: int) -> torch.Tensor:
    """Stands for `transfer.page_locked`."""
    block = torch.empty(num_bytes, dtype=torch.uint8)
    setattr(block, _PINNED, True)
    return block


def faked(value, mode: FakeTensorMode):
    """Makes fake tensors of a batch that is pinned, in fake blocks."""
    blocks: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        block, copy = getattr(tensor, transfer._BLOCK, None), mode.from_tensor(tensor)
        if block is not None and id(block) not in blocks:
            blocks[id(block)] = mode.from_tensor(block)
            setattr(blocks[id(block)], _PINNED, getattr(block, _PINNED, False))
        if block is not None:
            setattr(copy, transfer._BLOCK, blocks[id(block)])
        return copy

    return transfer.map_tensors(value, fake, {})


def dry_run(
    run: RunConfig, manifest: Manifest, batches: list, frozen=(), plant=None, scores: bool = False, saves: bool = False
) -> Result:
    """Trains on `batches`, or scores them, on fake CUDA tensors. `plant(stage, batch)` is called before each loss."""
    runtime, result, launched = Runtime(0, dist.get_world_size(), 0, CUDA), Result(), set()
    sharded = looked_up_tables(run, manifest)
    # Without a shape_env, an output whose size depends on data raises instead of getting a symbolic size.
    with FakeTensorMode() as mode, on_fake_cuda(launched):
        stage = find(run.stage)(run, manifest)
        model = stage.model(sharded)
        _move(model)
        names = tuple(table.name for table in sharded)
        tables = FakeTables(run.tables.embedding_dim, frozen)
        components = Components(tables, model, stage, names, IdRemapper(manifest, {}, {}), runtime)
        if plant is not None:
            loss_sums = stage.loss_sums
            stage.loss_sums = lambda model, rows, batch: loss_sums(model, rows, plant(batch))
        step = TrainingStep(run, components, StepProfiler(run, runtime, model), lambda _: 1.0, lambda: None)
        parts = [faked(batch, mode) for batch in batches]
        with Watch() as watch, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*CUDA is not available.*")
            if scores:
                _score(run, components, parts)
            else:
                for done in step.run_steps(iter(parts), 0, len(parts)):
                    assert done.loss_sums_L.is_cuda and done.counts_L.is_cuda
                    result.copies.append(watch.copies)
                    watch.copies = 0
                result.without_gradient = [name for name, p in model.named_parameters() if p.grad is None]
                if saves:
                    result.staging_syncs = _stage_checkpoint(step)
        for name, parameter in model.named_parameters():
            assert parameter.is_cuda and (parameter.grad is None or parameter.grad.is_cuda), name
    if dist.get_world_size() > 1 and parallel.DDP.broadcasts:
        watch.waits.add(f"{parallel.DDP.broadcasts} broadcasts of buffers")
    result.waits, result.products, result.launched = sorted(watch.waits), watch.products, sorted(launched)
    return result


def _move(model: torch.nn.Module) -> None:
    """Moves parameters and buffers alone, as `to` does, which refuses fake tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to(CUDA))
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(CUDA)


def _score(run: RunConfig, components: Components, parts: list) -> None:
    """Validates up to the copy of the scores to the host, which has to wait."""
    added = []

    def add(self, *columns) -> None:
        assert all(column.is_cuda for column in columns if column is not None), [c.device for c in columns]
        added.append(len(columns[0]))

    components.model.eval()
    with (
        torch.no_grad(),
        torch.autocast("cuda", torch.bfloat16, enabled=run.train.bf16),
        unittest.mock.patch.object(Predictions, "add", add),
        unittest.mock.patch("gpsd_dist.stages.finetune.gather_metrics", lambda *_: {}),
    ):
        components.stage.evaluate(components, parts, None)
    assert len(added) == len(parts) * len(components.stage.tasks)


def _stage_checkpoint(step: TrainingStep) -> int:
    """Copies weights and optimizer state to the host, as a save does; returns how often the host waited."""
    before = Stream.syncs
    tensors = {"dense": dict(step.model.state_dict()), "optimizer": named_state(step.optimizer, step.model)}
    staging = files.Staging()
    for _ in range(2):
        copies = staging.copy(tensors)
    assert not any(copy.is_cuda for copy in files._local_parts(copies))
    return Stream.syncs - before


def planted_item(batch):
    """Asks the device for a number."""
    batch.history_time_s_T.sum().item()
    return batch


def planted_mask(batch):
    """Selects by a mask, whose size the host has to wait for."""
    batch.history_time_s_T[batch.history_time_s_T > 0].sum()
    return batch


def planted_copy(batch):
    """Copies pageable memory to the device."""
    torch.zeros(3).to(CUDA)
    return batch


def planted_host_tensor(batch):
    """Leaves the requests of the candidates on the host."""
    packing = dataclasses.replace(batch.packing, request_C=torch.zeros(batch.packing.num_candidates, dtype=torch.int64))
    return dataclasses.replace(batch, packing=packing)


def planted_written_mask(batch):
    """Makes ids unknown on the device."""
    item_C = batch.candidate["item"].clone()
    item_C[item_C > 5] = 1
    return dataclasses.replace(batch, candidate=batch.candidate | {"item": item_C})


def planted_host_weights(batch):
    """Leaves the weights of the candidates on the host."""
    return dataclasses.replace(batch, sampling=batch.sampling | {"weight": torch.ones(batch.packing.num_candidates)})


def planted_host_targets(batch):
    """Leaves on the host which places hold a target."""
    is_real_M = torch.ones(len(batch.padded.targets.is_real_M), dtype=torch.bool)
    targets = dataclasses.replace(batch.padded.targets, is_real_M=is_real_M)
    return dataclasses.replace(batch, padded=dataclasses.replace(batch.padded, targets=targets))


def planted_host_edges():
    """Keeps the edges of buckets in an attribute, which does not go to the device with the model."""

    def keep(self, name, tensor):
        setattr(self, name, tensor)

    return unittest.mock.patch.object(NumberBuckets, "register_buffer", keep)


def planted_host_average():
    """Keeps the mean of the weights on the host."""
    made = optim.WeightAverage.__init__

    def make(self, *args):
        made(self, *args)
        self.other = {name: torch.empty(mean.shape) for name, mean in self.other.items()}

    return unittest.mock.patch.object(optim.WeightAverage, "__init__", make)


def planted_item_in_graph():
    """Asks for a number between tower and loss."""
    forward = RankingHeads.forward

    def asking(self, x_C):
        x_C.sum().item()
        return forward(self, x_C)

    return unittest.mock.patch.object(RankingHeads, "forward", asking)


def planted_buffers():
    """Has rank 0 send the buffers, which are alike on all ranks, in every step."""
    return unittest.mock.patch.object(parallel.DDP, "will_sync_module_buffers", lambda _: True)


def with_sampling(batch, values: dict[str, float]):
    """Gives all candidates these values of columns of sampling."""
    columns = {name: torch.full((batch.packing.num_candidates,), value) for name, value in values.items()}
    return dataclasses.replace(batch, sampling=columns)


def write_data(folder: pathlib.Path) -> Manifest:
    """Writes the tiny data set, with quantiles of its numbers."""
    manifest = write_tiny_data(folder)
    measured = [dataclasses.replace(f, quantiles=(-0.5, 0.5)) if f.table is None else f for f in manifest.features]
    manifest = dataclasses.replace(manifest, features=tuple(measured))
    write_manifest(manifest, folder)
    return manifest


def main(argv: list[str]) -> int:
    """Runs the named cases, or all; writes case -> Result as JSON."""
    folder, results = pathlib.Path(tempfile.mkdtemp()), {}
    manifest = write_data(folder / "data")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    made: dict[str, list] = {}

    def batches_of(run: RunConfig, sampling: dict[str, float]) -> list:
        """Two steps' batches, pinned; runs that differ in the model alone share them. `sampling`: in all its rows."""
        key = repr((run.stage, run.data, run.pretrain, run.train.micro_batches, run.execution.token_multiple, sampling))
        if key not in made:
            loader = Trainer(run, Runtime(0, 1, 0, torch.device("cpu"))).loader
            with unittest.mock.patch.object(transfer, "page_locked", page_locked):
                for parts, _ in zip(iter(loader), range(2), strict=False):
                    parts = tuple(with_sampling(part, sampling) for part in parts)
                    made.setdefault(key, []).append(transfer.pinned(parts))
            loader.close()
        return made[key]

    def go(label: str, stage: str, changes: dict, num_steps: int = 1, **options) -> None:
        changes = {part: dict(fields) for part, fields in changes.items()}
        changes["train"] = {"log_interval_steps": 1000} | changes.get("train", {})  # a step that logs may wait
        sampling = changes.pop("sampling", {})
        run = tiny_run(stage, folder / "data", folder / label.replace("/", "_"), **changes)
        of_rows = dataclasses.replace(manifest, sampling=tuple(sampling))
        kind = changes.get("execution", {}).get("dense_parallel")
        try:
            with contextlib.nullcontext() if kind is None else two_ranks():
                result = dry_run(run, of_rows, batches_of(run, sampling)[:num_steps], **options)
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0][:300]
            where = place(traceback.extract_tb(error.__traceback__))
            result = Result(error=f"{type(error).__name__}: {first_line} at {where}")
        results[label] = dataclasses.asdict(result)

    for label in argv[1:] or CASES:
        # Two steps where the second could differ. DDP's second step makes new buckets, by numbers of a tensor.
        go(label, *CASES[label], num_steps=2 if label in STEPS_TWICE else 1, saves=label in SAVED)
        if label in SCORED and not argv[1:]:
            go(f"{label} scored", *CASES[label], scores=True)
    if not argv[1:]:
        go("frozen", "finetune", BF16, frozen=("item", "tag"))
        for name, (label, _) in PLANTS.items():
            planted = globals()[f"planted_{name}"]
            of_batch = bool(inspect.signature(planted).parameters)
            with contextlib.nullcontext() if of_batch else planted():
                go(f"planted {name}", *CASES[label], plant=planted if of_batch else None)
        pageable = lambda layout: [torch.empty(shape, dtype=dtype) for shape, dtype in layout]  # noqa: E731
        with unittest.mock.patch.dict(globals(), host_block=pageable):
            go("planted pageable checkpoint", "finetune", BF16, saves=True)
        with unittest.mock.patch.object(transfer, "_BLOCK", "no block"):
            go("planted copies", "finetune", BF16)
        made.clear()
        with unittest.mock.patch.dict(globals(), page_locked=lambda size: torch.empty(size, dtype=torch.uint8)):
            go("planted pageable batch", "finetune", BF16)
        made.clear()
        from tests.cuda_dry_run import evaluated, roofline

        others = roofline.results() | evaluated.results(folder)
        pathlib.Path(argv[0]).with_name("others.json").write_text(json.dumps(others, indent=1))
        autocast = torch.autocast
        with unittest.mock.patch(
            "torch.autocast", lambda device, dtype, enabled: autocast(device, dtype, enabled=False)
        ):
            go("planted no autocast", "finetune", BF16)
    pathlib.Path(argv[0]).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
