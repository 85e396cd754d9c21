"""Has Inductor write the code of the compiled tower for an H200 that is not there, and counts its kernels; the same of
tower, head and losses together, which `cuda_graphs` captures.

    python -m tests.cuda_compile.inductor RESULTS.json

Fake CUDA tensors go through AOTAutograd, which splits forward and backward as in training; Inductor lowers both and
writes Triton code. Replaced are the properties of the device; nothing is compiled further, and nothing runs.
"""

# ruff: noqa: I001
from tests.cuda_dry_run import dry_run  # loads the shim: before torch

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
import types
import typing
import unittest.mock

import numpy as np
import torch
import torch._dynamo.device_interface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gpsd_dist.assembly import looked_up_tables
from gpsd_dist.batch.transfer import map_tensors, to_device
from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model import transformer
from gpsd_dist.plan.measured import stand_in
from gpsd_dist.stages.registry import find
from tests.cuda_dry_run import roofline
from tests.helpers.synthetic import make_manifest
from tests.integration.tiny_data import tiny_run

WIDTH = 256
_H200 = {"name": "NVIDIA H200", "multi_processor_count": 132, "major": 9, "minor": 0, "warp_size": 32}
_H200 |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
_H200 |= {"shared_memory_per_block_optin": 232448, "total_memory": 140 << 30, "gcnArchName": ""}
_GEOMETRY = ("position_S", "history_offsets", "candidate_offsets", "request_C")


class _Written(Exception):
    """Ends the compiler where it has written its code."""


def counted(code: str) -> dict[str, typing.Any]:
    """Counts what a generated module launches."""
    calls = [line for line in code.splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(calls)
    return {
        "kernels": len(re.findall(r"\.run\(", text)),
        "products": len(re.findall(r"extern_kernels\.\w+\(", text)),
        "fallbacks": sorted(set(re.findall(r"= torch\.ops\.([\w.]+)\(", text))),
    }


@contextlib.contextmanager
def _for_h200(codes: list[str]) -> typing.Iterator[None]:
    def write(graph):
        codes.append(graph.codegen()[0].value)
        raise _Written

    answers = {
        "get_device_properties": types.SimpleNamespace(**_H200),
        "get_compute_capability": 90,
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    driver.set_active(target)
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            value = staticmethod(lambda *_, answer=answer, **__: answer)
            stack.enter_context(unittest.mock.patch(f"torch._dynamo.device_interface.CudaInterface.{name}", value))
        for name in ("get_device_properties", "current_device", "device_count"):
            value = answers[name]
            stack.enter_context(unittest.mock.patch(f"torch.cuda.{name}", lambda *_, value=value: value))
        stack.enter_context(unittest.mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(unittest.mock.patch("torch.compiler.is_compiling", lambda: True))
        stack.enter_context(unittest.mock.patch.object(GraphLowering, "compile_to_module", write))
        yield


def _capture(graph_module, inputs):
    try:
        compile_fx.compile_fx_inner(graph_module, inputs)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _Written):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
    return make_boxed_func(graph_module.forward)


_COMPILERS = {"fw_compiler": _capture, "bw_compiler": _capture, "decompositions": select_decomp_table()}


def tower_code(shown: int, layers: int = 2) -> list[str]:
    """Writes the code of forward and backward of a Transformer in bf16, with `shown` candidates a request."""
    codes: list[str] = []
    packing = Packing.from_lengths(np.full(8, 50), np.full(8, shown))
    with FakeTensorMode() as mode, dry_run.on_fake_cuda(set()), _for_h200(codes):
        with dry_run.CUDA:
            tower = transformer.Transformer(ModelConfig(layers=layers, width=WIDTH, heads=4), 1)
        packing = to_device(map_tensors(packing, mode.from_tensor, {}), dry_run.CUDA)
        weights = dict(tower.named_parameters())

        def run(x_SD, *rest):
            given = dataclasses.replace(packing, **dict(zip(_GEOMETRY, rest, strict=False)))
            named = dict(zip(weights, rest[len(_GEOMETRY) :], strict=True))
            with torch.autocast("cuda", torch.bfloat16):
                return torch.func.functional_call(tower, named, (x_SD, given, shown > 0))

        compiled = aot_function(run, partition_fn=min_cut_rematerialization_partition, **_COMPILERS)
        x_SD = torch.empty(8 * (50 + shown), WIDTH, device=dry_run.CUDA, requires_grad=True)
        compiled(x_SD, *(getattr(packing, name) for name in _GEOMETRY), *weights.values()).sum().backward()
    return codes


def sums_code(shown: int) -> list[str]:
    """Writes the code of what `cuda_graphs` captures, for a Transformer of two layers in bf16."""
    codes: list[str] = []
    size = {"layers": 2, "width": WIDTH, "heads": 4}
    stage_name, pretrain = "finetune" if shown else "pretrain", {"num_negative_groups": 1, "num_negatives": 512}
    options = {"model": size, "tables": {"embedding_dim": WIDTH}, "pretrain": pretrain, "execution": roofline.GRAPHS}
    run = tiny_run(stage_name, "x", "y", train={"bf16": True}, **options)
    manifest, stand_in_sizes = make_manifest(table_rows={"item": 1000}), (np.full(8, 50), shown, 0 if shown else 512)
    host = roofline.padded(run, stand_in(manifest, *stand_in_sizes))

    def compiled(function, *values):
        found: dict[int, torch.Tensor] = {}
        map_tensors(values, lambda tensor: found.setdefault(id(tensor), tensor), {}, with_host_parts=False)

        def call(*tensors):
            replaced = dict(zip(found, tensors, strict=False))
            given = map_tensors(values, lambda tensor: replaced[id(tensor)], {}, with_host_parts=False)
            named = dict(zip(weights, tensors[len(found) :], strict=True))
            with torch.autocast("cuda", torch.bfloat16), _reparametrize_module(model, named):
                return function(*given)

        return aot_function(call, partition_fn=min_cut_rematerialization_partition, **_COMPILERS)(
            *found.values(), *weights.values()
        )

    with FakeTensorMode() as mode, dry_run.on_fake_cuda(set()), _for_h200(codes):
        stage = find(stage_name)(run, manifest)
        with dry_run.CUDA:
            model = stage.model(looked_up_tables(run, manifest))
            rows = {table: torch.empty(100, WIDTH, requires_grad=True) for table in ("item", "tag")}
        weights = dict(model.named_parameters())
        model.backbone.call_padded = compiled
        batch = to_device(map_tensors(host, mode.from_tensor, {}), dry_run.CUDA)
        stage.loss_sums(model, rows, batch).sum().backward()
    return codes


def _planted_rotation(x_S3HK, turn):
    """Rotates by complex numbers, as until commit 616a7b2: Inductor has no kernel for them."""
    return transformer.turned_as_complex(x_S3HK.float().unflatten(-1, (-1, 2)), turn).flatten(-2).to(x_S3HK.dtype)


def main(argv: list[str]) -> None:
    results = {"pretrain": [counted(code) for code in tower_code(0)]}
    results["ranking"] = [counted(code) for code in tower_code(4)]
    results["pretraining with loss"] = [counted(code) for code in sums_code(0)]
    results["ranking with loss"] = [counted(code) for code in sums_code(2)]
    with unittest.mock.patch.object(transformer, "_turned", _planted_rotation):
        results["planted complex numbers"] = [counted(code) for code in tower_code(0, layers=1)]
    pathlib.Path(argv[0]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
