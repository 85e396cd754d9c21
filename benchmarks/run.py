"""Training throughput of the product against the official scheme, measured side by side.

    python -m benchmarks.run --suite cpu [--names pretrain/grocery/h64,...] [--seconds 30] [--out runs/bench/bench.json]
    python -m benchmarks.run --suite ablation [--names discriminative/grocery/h64] [--markdown FILE]
    python -m benchmarks.run --suite frozen | growth | loader
    python -m benchmarks.run --suite gpu [--names lookup,...]      (benchmarks/gpu_suite.py)

cpu       product against baseline, name by name. A name is kind/data/size: kind pretrain | discriminative |
          discriminative_k2 (two candidates per request), data grocery | kuairand | taobao_like, size h64 | h128 | h256
          (four layers, four heads) | l24h1024a16 (16 requests a step on both sides; 16 GiB of memory for the two).
          `all` selects every name.
ablation  every optimisation switched on its own, as parts added to the baseline and as parts taken out of the product.
frozen    step time with a frozen item table over that with a trained one, at 1 and 10 million rows.
growth    step time against rows, batch, history length and candidates, with the exponent that one would expect; and
          one process against two, with the phases of a step.
loader    tokens per CPU-second from Parquet to batches.

Every side trains in a process of its own on one thread; they take turns, and ratios compare neighbours in time.
tokens_per_cpu_s is real history tokens, each request counted once, per CPU second of the whole process with all its
threads: loader, forward, backward, optimizer. --markdown writes the tables of docs/performance.md.
"""

import argparse
import json
import pathlib
import platform
import sys
import tempfile
import time

import rich.console
import torch

from benchmarks import compare, frozen_tables, growth, loader_throughput
from benchmarks.datasets import CANDIDATES_PER_ROW, SOURCES
from benchmarks.sides import SIZES
from benchmarks.tables import Table

SUITES = ("cpu", "ablation", "frozen", "growth", "loader", "gpu")
NAMES = tuple(f"{kind}/{data}/{size}" for kind in CANDIDATES_PER_ROW for data in SOURCES for size in SIZES)
DEFAULT_NAMES = {
    "cpu": (
        "pretrain/grocery/h64",
        "pretrain/grocery/h256",
        "pretrain/kuairand/h64",
        "pretrain/taobao_like/h64",
        "discriminative/grocery/h64",
        "discriminative_k2/grocery/h64",
    ),
    "ablation": ("pretrain/grocery/h64", "discriminative/grocery/h64"),
    "frozen": tuple(frozen_tables.ROWS),
    "growth": tuple(growth.SWEEPS),
    "loader": tuple(loader_throughput.COMPRESSIONS),
}


def selected(suite: str, names: str) -> tuple[str, ...]:
    """ValueError lists the known names."""
    known = NAMES if suite in ("cpu", "ablation") else DEFAULT_NAMES[suite]
    if names in ("", "all"):
        return known if names else DEFAULT_NAMES[suite]
    chosen = tuple(names.split(","))
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ValueError(f"--names {unknown} are not benchmarks of suite {suite!r}; there are {list(known)}")
    return chosen


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--names", default="", help="comma-separated, or all; default: a subset of some minutes")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="CPU time per name (ablation: per variant) after warm-up"
    )
    parser.add_argument("--data_root", type=pathlib.Path, default=pathlib.Path("data"), help="prepared data sets")
    parser.add_argument("--out", type=pathlib.Path, help="JSON; default runs/bench/bench.json, or SUITE.json there")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the tables as Markdown")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = pathlib.Path("runs/bench") / ("bench.json" if args.suite == "cpu" else f"{args.suite}.json")
    return args


def _measure(args: argparse.Namespace, names: tuple[str, ...], console: rich.console.Console) -> list[Table]:
    """Runs the suite name by name, rewriting the JSON after each; -> tables."""
    entries: list[dict] = []
    suite = {
        "cpu": compare.against_baseline,
        "ablation": compare.ablation,
        "frozen": frozen_tables.measure,
        "growth": growth.measure,
        "loader": loader_throughput.measure,
    }[args.suite]
    with tempfile.TemporaryDirectory(prefix="gpsd-bench-") as folder:
        for name in names:
            begin = time.perf_counter()
            entries += suite(name, args.seconds, args.data_root, pathlib.Path(folder))
            args.out.write_text(json.dumps(entries, indent=1) + "\n")
            console.print(f"{name}: done in {time.perf_counter() - begin:.0f} s")
    show = {
        "cpu": compare.comparison_tables,
        "ablation": compare.ablation_tables,
        "frozen": frozen_tables.tables,
        "growth": growth.tables,
        "loader": loader_throughput.tables,
    }[args.suite]
    return show(entries)


def main(argv: list[str]) -> int:
    """Exit status 2 for a wrong name."""
    args = _arguments(argv)
    if args.suite == "gpu":
        from benchmarks import gpu_suite  # needs CUDA and imports its compilers

        return gpu_suite.report(gpu_suite.NAMES if args.names in ("", "all") else args.names.split(","), args.out)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    try:
        names = selected(args.suite, args.names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"torch {torch.__version__}, {platform.machine()}, one thread, {len(names)} names")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tables = _measure(args, names, console)
    for table in tables:
        console.print(table.rich())
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text("\n\n".join(table.markdown() for table in tables) + "\n")
    console.print(f"written to {args.out}" + (f" and {args.markdown}" if args.markdown else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
