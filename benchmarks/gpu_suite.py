"""What one GPU does with the product, part by part; a part that fails is reported and does not end the others.

    python -m benchmarks.run --suite gpu [--names train/l4h256a4,lookup] [--out runs/bench/gpu.json]

train/<size>[/<option>]   pretraining in bf16 at 64k tokens a step with 4096 shared negatives: real tokens/s, MFU,
                          memory; the same batches over and over (`device`), and with the loader (`loop`); without
                          `sparse_dist` also the phases of a step with the loader, see step_split.py
lookup                    sharded lookup of table rows against a plain copy of as many bytes
host_syncs                calls of a training step that make the host wait for the GPU, by place
attention                 two flash parts against length buckets, forward and backward, and the error of both
hstu_kernel               HSTU's Triton kernel against length buckets

Without a GPU only `toy` sizes make sense: the test that keeps this file alive runs them on CPU.
"""

import json
import pathlib
import tempfile
import traceback
import typing

import rich.console
import rich.table
import torch

from benchmarks.gpu_bench import Bench, Sizes
from benchmarks.gpu_kernels import attention_kernels, hstu_kernel, lookup
from benchmarks.gpu_training import TRAINED, host_syncs, train
from benchmarks.step_split import split_table
from gpsd_dist.distributed.runtime import Runtime, process_group

OPTIONS = ("", "compile", "sparse_dist", "activation_checkpointing")
NAMES = (
    *(f"train/{size}{'/' if option else ''}{option}" for size in TRAINED for option in OPTIONS),
    "lookup",
    "host_syncs",
    "attention",
    "hstu_kernel",
)
GOALS = {
    "train/l24h1024a16": "mfu >= 0.45",
    "train/l4h256a4": "device_tokens_per_s >= 8e6",
    "lookup": "time_ratio <= 1.25",
    "host_syncs": "waits == 0",
}

PARTS: dict[str, typing.Callable[[Bench, str], dict[str, typing.Any]]] = {
    "train": train,
    "lookup": lookup,
    "host_syncs": host_syncs,
    "attention": attention_kernels,
    "hstu_kernel": hstu_kernel,
}


def measure(
    names: typing.Sequence[str], sizes: Sizes, runtime: Runtime, out: pathlib.Path
) -> list[dict[str, typing.Any]]:
    """One entry per name, written to `out` after each: a later failure loses nothing."""
    entries: list[dict] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else "CPU"
    for name in names:
        entry: dict[str, typing.Any] = {
            "name": name,
            "device": device,
            "torch": torch.__version__,
            "goal": GOALS.get(name),
        }
        with tempfile.TemporaryDirectory(prefix="gpsd-gpu-") as folder:
            try:
                if runtime.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                entry |= PARTS[name.split("/")[0]](Bench(sizes, runtime, pathlib.Path(folder)), name)
            except Exception as error:  # whatever it is, the other parts still count; the report shows it
                entry |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        entries.append(entry)
        out.write_text(json.dumps(entries, indent=1) + "\n")
    return entries


def report(names: typing.Sequence[str], out: pathlib.Path, sizes: Sizes | None = None) -> int:
    """Measures and prints; exit status 1 if a part failed, 2 for a wrong name, or without a GPU."""
    console = rich.console.Console()
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        console.print(f"error: --names {unknown} are not parts of the GPU suite; there are {list(NAMES)}")
        return 2
    if sizes is None and not torch.cuda.is_available():
        console.print("error: --suite gpu needs a CUDA device; python -m gpsd_dist.doctor says what is missing")
        return 2
    with process_group(timeout_s=600) as runtime:
        entries = measure(names, sizes or Sizes(), runtime, out)
    table = rich.table.Table("part", "measured", "goal")
    for entry in entries:
        shown = {k: v for k, v in entry.items() if isinstance(v, int | float | str) and k not in ("name", "traceback")}
        text = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items() if k != "goal"
        )
        table.add_row(entry["name"], text, entry["goal"] or "")
    console.print(table)
    splits = {entry["name"]: entry["step_split_ms"] for entry in entries if "step_split_ms" in entry}
    if splits:
        console.print(split_table("Phases of a step, ms", splits).rich())
    console.print(f"written to {out}")
    return 1 if any("error" in entry for entry in entries) else 0
