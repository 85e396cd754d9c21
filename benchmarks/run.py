"""Training throughput of the product against the official scheme, measured side by side in one process.

    python -m benchmarks.run --suite cpu [--names pretrain/grocery/h64,...] [--seconds 30] [--out runs/bench/bench.json]
    python -m benchmarks.run --suite loader
    python -m benchmarks.run --suite gpu [--names lookup,...]      (benchmarks/gpu_suite.py)

A name is kind/data/width: kind pretrain | discriminative | discriminative_k2 (two candidates per request), data
grocery | kuairand | taobao_like, width h64 | h128 | h256. `all` selects every name. Both sides train L4A4 from random
weights; blocks of steps alternate (baseline, product, baseline, ...) and the ratio is taken pair by pair.

tokens_per_cpu_s is real history tokens, each request counted once, per CPU second of the whole process with all its
threads: loader, forward, backward, optimizer.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import pathlib
import platform
import resource
import statistics
import sys
import tempfile
import time
import typing

import rich.console
import rich.table
import torch

from benchmarks import gpu_suite, loader_throughput
from benchmarks.datasets import CANDIDATES_PER_ROW, SOURCES, BenchData, prepare
from benchmarks.padded_baseline import PaddedBaseline, PaddedLoader
from benchmarks.product import Product, run_config, split_step
from gpsd_dist.config import PretrainConfig
from gpsd_dist.distributed.runtime import Runtime, process_group

WIDTHS = {"h64": 64, "h128": 128, "h256": 256}
NAMES = tuple(f"{kind}/{data}/{width}" for kind in CANDIDATES_PER_ROW for data in SOURCES for width in WIDTHS)
DEFAULT_NAMES = (
    "pretrain/grocery/h64",
    "pretrain/grocery/h256",
    "pretrain/kuairand/h64",
    "pretrain/taobao_like/h64",
    "discriminative/grocery/h64",
    "discriminative_k2/grocery/h64",
)
NUM_NEGATIVES = 4096
_COMPARED = PretrainConfig(num_negatives=NUM_NEGATIVES, auxiliary=("category",))
_DEFAULT = PretrainConfig(auxiliary=("category",))
_MIN_PAIRS, _MAX_PAIRS = 3, 9
_SPLIT_STEPS = 20
_BLOCK_S = 2.0  # shortest block


class Side(typing.Protocol):
    """One of the things compared."""

    def run_steps(self, count: int) -> int:
        """Trains; returns real tokens."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Steps of one side without a break."""

    num_tokens: int
    cpu_s: float
    wall_s: float

    @property
    def tokens_per_cpu_s(self) -> float:
        """Of this block."""
        return self.num_tokens / self.cpu_s


def timed_block(side: Side, count: int) -> Block:
    """Runs `count` steps with the garbage of the other side collected beforehand."""
    gc.collect()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    num_tokens = side.run_steps(count)
    return Block(num_tokens, time.process_time() - cpu_s, time.perf_counter() - wall_s)


def interleave(sides: dict[str, Side], seconds: float) -> dict[str, list[Block]]:
    """Warms every side up, then alternates blocks of steps until `seconds` of CPU time are about used up."""
    step_s = {}
    for name, side in sides.items():
        side.run_steps(1)
        step_s[name] = timed_block(side, 1).cpu_s
    round_s = sum(max(step, _BLOCK_S) for step in step_s.values())
    num_pairs = min(max(round(seconds / round_s), _MIN_PAIRS), _MAX_PAIRS)
    counts = {name: max(1, round(_BLOCK_S / step)) for name, step in step_s.items()}
    blocks: dict[str, list[Block]] = {name: [] for name in sides}
    for _ in range(num_pairs):
        for name, side in sides.items():
            blocks[name].append(timed_block(side, counts[name]))
    return blocks


def baseline_rows(data: BenchData, width: int) -> int:
    """Requests per baseline step: those of the product; less in wide pretraining, whose [B, N, D] negatives would
    not fit into an ordinary machine. The cost per token hardly depends on it."""
    if data.split != "pretrain":
        return data.source.batch_rows
    return min(data.source.batch_rows, 512 * 64 // width)


def measure(name: str, args: argparse.Namespace, folder: pathlib.Path, runtime: Runtime) -> list[dict]:
    """Rows of bench.json for one name; pretraining has a second one, with the product's default negatives."""
    kind, data_name, width_name = name.split("/")
    width = WIDTHS[width_name]
    data = prepare(kind, data_name, args.data_root, folder)
    is_pretraining = data.split == "pretrain"
    rows = baseline_rows(data, width)
    loader = PaddedLoader(
        data.data_dir, data.manifest, data.split, batch_rows=rows, num_negatives=NUM_NEGATIVES if is_pretraining else 0
    )
    configs = {name: _COMPARED} | ({f"{name}/default_negatives": _DEFAULT} if is_pretraining else {})
    output_dirs = (folder / f"{kind}-{data_name}-{width}-{index}" for index in range(len(configs)))
    products = {
        label: Product(run_config(data, width, pretrain, output_dir), runtime)
        for (label, pretrain), output_dir in zip(configs.items(), output_dirs, strict=False)
    }
    baseline = PaddedBaseline(loader, data.manifest, layers=4, width=width, heads=4)
    blocks = interleave({"baseline": baseline, **products}, args.seconds)
    entries = []
    for label, product in products.items():
        entry = _entry(label, blocks["baseline"], blocks[label])
        entry |= {"data": data.note, "batch_requests": data.source.batch_rows, "baseline_batch_requests": rows}
        if is_pretraining:
            entry["negatives"] = f"{configs[label].num_negative_groups} x {configs[label].num_negatives} shared"
            entry["baseline_negatives"] = f"{NUM_NEGATIVES} per sequence"
        entry["step_split_ms"] = split_step(product, _SPLIT_STEPS)
        entries.append(entry)
        product.close()
    return entries


def _entry(name: str, baseline: list[Block], product: list[Block]) -> dict:
    ratios = [p.tokens_per_cpu_s / b.tokens_per_cpu_s for p, b in zip(product, baseline, strict=True)]
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "tokens_per_cpu_s": statistics.median(block.tokens_per_cpu_s for block in product),
        "baseline_tokens_per_cpu_s": statistics.median(block.tokens_per_cpu_s for block in baseline),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": len(ratios),
        "product_cpu_s": sum(block.cpu_s for block in product),
        "baseline_cpu_s": sum(block.cpu_s for block in baseline),
        "cpu_share": sum(b.cpu_s for b in product + baseline) / sum(b.wall_s for b in product + baseline),
    }


def show(entries: list[dict], console: rich.console.Console) -> None:
    """Ratios, then the phases of the product's step."""
    table = rich.table.Table(title="real tokens per CPU-second, product against padded baseline")
    for column in ("name", "ratio", "min - max", "product", "baseline", "negatives per step", "data"):
        table.add_column(column, justify="left" if column in ("name", "data") else "right")
    for entry in entries:
        table.add_row(
            entry["name"],
            f"{entry['ratio']:.1f}x",
            f"{entry['ratio_min']:.1f} - {entry['ratio_max']:.1f}",
            f"{entry['tokens_per_cpu_s']:,.0f}",
            f"{entry['baseline_tokens_per_cpu_s']:,.0f}",
            entry.get("negatives", ""),
            entry["data"],
        )
    console.print(table)
    phases = list(dict.fromkeys(phase for entry in entries for phase in entry["step_split_ms"]))
    split = rich.table.Table(title="phases of the product's step, ms of CPU time")
    split.add_column("name")
    for phase in phases:
        split.add_column(phase, justify="right")
    for entry in entries:
        times = entry["step_split_ms"]
        split.add_row(entry["name"], *(f"{times[phase]:.1f}" if phase in times else "" for phase in phases))
    console.print(split)


def _selected(names: str) -> tuple[str, ...]:
    """ValueError lists the known names."""
    if names in ("", "all"):
        return NAMES if names else DEFAULT_NAMES
    chosen = tuple(names.split(","))
    unknown = sorted(set(chosen) - set(NAMES))
    if unknown:
        raise ValueError(f"--names {unknown} are not benchmarks; there are {list(NAMES)}")
    return chosen


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("cpu", "loader", "gpu"), default="cpu")
    parser.add_argument("--names", default="", help="comma-separated, or all; default: a subset of some minutes")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="CPU time per name after warm-up (at least 3 pairs)"
    )
    parser.add_argument("--data_root", type=pathlib.Path, default=pathlib.Path("data"), help="prepared data sets")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench/bench.json"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exit status 2 for a wrong name."""
    args = _arguments(argv)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    if args.suite == "gpu":
        return gpu_suite.report(args.names.split(",") if args.names else gpu_suite.NAMES, args.out)
    if args.suite == "loader":
        loader_throughput.report(num_rows=400_000, num_passes=3)
        return 0
    try:
        names = _selected(args.names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    console.print(f"torch {torch.__version__}, {platform.machine()}, one thread, {len(names)} names")
    entries: list[dict] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpsd-bench-")))
        runtime = stack.enter_context(process_group(timeout_s=600))
        for name in names:
            begin = time.perf_counter()
            entries += measure(name, args, folder, runtime)
            gc.collect()
            args.out.write_text(json.dumps(entries, indent=1) + "\n")
            console.print(f"{name}: {entries[-1]['ratio']:.1f}x in {time.perf_counter() - begin:.0f} s")
    show(entries, console)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"peak memory {peak_gib:.1f} GiB; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
