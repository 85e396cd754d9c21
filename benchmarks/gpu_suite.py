"""Measures what one GPU does with the product, part by part, each in a process of its own.

    python -m benchmarks.run --suite gpu [--names train/l4h256a4,lookup] [--out runs/bench/gpu.json]

attention                 two flash parts against length buckets, forward and backward, and the error of both
lookup                    sharded lookup of table rows against a plain copy of as many bytes
host_syncs                calls of a training step that make the host wait for the GPU, by place
train/<size>[/<option>]   pretraining in bf16 at 64k tokens a step with 4096 shared negatives: real tokens/s, MFU,
                          memory; the same batches over and over (`device`), and with the loader (`loop`); without
                          `sparse_dist` also the phases of a step with the loader, see step_split.py; peak memory beside
                          what gpsd_dist.plan says
hstu_kernel               HSTU's Triton kernel against length buckets

The order is what is worth most first, which are the parts with goals, and compiling last. After an error on the device,
every later call in the same process fails, too: hence the processes. A part that dies is recorded with its exit status
and the end of its stderr; the JSON is rewritten after every part. `attention` and `hstu_kernel` need neither TorchRec
nor FBGEMM, nor does this module import them.
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import typing

import rich.console
import rich.markup
import rich.table
import torch

PARTS = {
    "attention": "benchmarks.gpu_kernels:attention_kernels",
    "lookup": "benchmarks.gpu_lookup:lookup",
    "host_syncs": "benchmarks.gpu_training:host_syncs",
    "train": "benchmarks.gpu_training:train",
    "hstu_kernel": "benchmarks.gpu_kernels:hstu_kernel",
}
"""First word of a name -> the function that measures it: (Bench, name) -> figures by name."""
_SMALL, _LARGE = "train/l4h256a4", "train/l24h1024a16"
NAMES = (
    "lookup",
    "host_syncs",
    _SMALL,
    _LARGE,
    "attention",
    "hstu_kernel",
    f"{_SMALL}/sparse_dist",
    f"{_LARGE}/activation_checkpointing",
    f"{_LARGE}/sparse_dist",
    f"{_SMALL}/profile",  # of three steps
    f"{_SMALL}/ranking",  # of two candidates
    f"{_SMALL}/frozen",  # the same with frozen tables
    f"{_SMALL}/activation_checkpointing",
    f"{_SMALL}/sasrec",
    f"{_SMALL}/hstu",
    f"{_SMALL}/compile",
    f"{_LARGE}/compile",
    f"{_SMALL}/cuda_graphs",
)
GOALS = {
    "train/l24h1024a16": "mfu >= 0.45",
    "train/l4h256a4": "device_tokens_per_s >= 8e6",
    "lookup": "time_ratio <= 1.25",
    "host_syncs": "waits == 0",
}
PART_TIMEOUT_S = 600.0
_STDERR_LINES = 40


def run_part(name: str, sizes: str) -> dict[str, typing.Any]:
    """Measures the entry of one part in a new process; with `error` and the last lines of `stderr` if that died."""
    with tempfile.TemporaryDirectory(prefix="gpsd-gpu-") as folder:
        out, errors = pathlib.Path(folder) / "entry.json", pathlib.Path(folder) / "stderr.txt"
        command = [sys.executable, "-m", "benchmarks.gpu_part", PARTS[name.split("/")[0]], name, sizes, str(out)]
        with errors.open("wb") as stderr:
            try:
                status: int | None = subprocess.run(command, stderr=stderr, timeout=PART_TIMEOUT_S).returncode
            except subprocess.TimeoutExpired:
                status = None
        entry = {"name": name, "goal": GOALS.get(name)}
        if out.exists():
            entry |= json.loads(out.read_text())
        if status != 0:
            lines = errors.read_text(errors="replace").splitlines()
            entry |= {"error": _ending(status), "stderr": lines[-_STDERR_LINES:]}
    return entry


def _ending(status: int | None) -> str:
    """Makes the entry of a part that died; `status` is the exit status, None if it took too long."""
    if status is None:
        return f"killed after {PART_TIMEOUT_S:g} s"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def measure(names: typing.Sequence[str], sizes: str, out: pathlib.Path) -> list[dict[str, typing.Any]]:
    """Runs part by part, and rewrites `out` after each: a later failure loses nothing."""
    entries: list[dict[str, typing.Any]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        entries.append(run_part(name, sizes))
        out.write_text(json.dumps(entries, indent=1) + "\n")
    return entries


def report(names: typing.Sequence[str], out: pathlib.Path, sizes: str = "gpu") -> int:
    """Measures and prints; exit status 1 if a part failed, 2 for a wrong name, or without a GPU."""
    console = rich.console.Console()
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        console.print(f"error: --names {unknown} are not parts of the GPU suite; there are {list(NAMES)}")
        return 2
    if sizes == "gpu" and not torch.cuda.is_available():
        console.print("error: --suite gpu needs a CUDA device; python -m gpsd_dist.doctor says what is missing")
        return 2
    entries = measure(names, sizes, out)
    table = rich.table.Table("part", "measured", "goal")
    for entry in entries:
        shown = {k: v for k, v in entry.items() if isinstance(v, int | float | str) and k not in ("name", "goal")}
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        reason = "\n".join(entry.get("stderr", [])[-3:])
        table.add_row(entry["name"], rich.markup.escape(f"{text}\n{reason}".strip()), entry["goal"] or "")
    console.print(table)
    splits = {entry["name"]: entry["step_split_ms"] for entry in entries if "step_split_ms" in entry}
    if splits:
        from benchmarks.step_split import split_table  # imports the trainer, and FBGEMM with it

        console.print(split_table("Phases of a step, ms", splits).rich())
    console.print(f"written to {out}")
    return 1 if any("error" in entry for entry in entries) else 0
