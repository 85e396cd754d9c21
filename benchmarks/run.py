"""Measures training throughput of the product and of the official scheme, side by side.

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
import dataclasses
import json
import pathlib
import platform
import sys
import tempfile
import time
import typing

import rich.console
import torch

from benchmarks.tables import Table


@dataclasses.dataclass(frozen=True)
class Suite:
    """Groups benchmarks that are measured name by name."""

    names: tuple[str, ...]
    default_names: tuple[str, ...]  # A subset that takes minutes
    measure: typing.Callable[[str, float, pathlib.Path, pathlib.Path], list[dict[str, typing.Any]]]
    """(name, seconds, data root, scratch folder) -> entries of the JSON file."""
    tables: typing.Callable[[list[dict[str, typing.Any]]], list[Table]]


# A suite is imported only when it is asked for: each needs other libraries, and a machine to measure on may lack some.
def _cpu() -> Suite:
    from benchmarks import compare

    return Suite(_compared_names(), CPU_NAMES, compare.against_baseline, compare.comparison_tables)


def _ablation() -> Suite:
    from benchmarks import compare

    defaults = ("pretrain/grocery/h64", "discriminative/grocery/h64")
    return Suite(_compared_names(), defaults, compare.ablation, compare.ablation_tables)


def _frozen() -> Suite:
    from benchmarks import frozen_tables

    names = tuple(frozen_tables.ROWS)
    return Suite(names, names, frozen_tables.measure, frozen_tables.tables)


def _growth() -> Suite:
    from benchmarks import growth

    names = tuple(growth.SWEEPS)
    return Suite(names, names, growth.measure, growth.tables)


def _loader() -> Suite:
    from benchmarks import loader_throughput

    names = tuple(loader_throughput.COMPRESSIONS)
    return Suite(names, names, loader_throughput.measure, loader_throughput.tables)


def _compared_names() -> tuple[str, ...]:
    from benchmarks.datasets import CANDIDATES_PER_ROW, SOURCES
    from benchmarks.sides import SIZES

    return tuple(f"{kind}/{data}/{size}" for kind in CANDIDATES_PER_ROW for data in SOURCES for size in SIZES)


SUITES = {"cpu": _cpu, "ablation": _ablation, "frozen": _frozen, "growth": _growth, "loader": _loader}
CPU_NAMES = (
    "pretrain/grocery/h64",
    "pretrain/grocery/h256",
    "pretrain/kuairand/h64",
    "pretrain/taobao_like/h64",
    "discriminative/grocery/h64",
    "discriminative_k2/grocery/h64",
)


def selected(suite_name: str, names: str) -> tuple[str, ...]:
    """Selects the names of `--names`. ValueError lists the known ones."""
    suite = SUITES[suite_name]()
    if names in ("", "all"):
        return suite.names if names else suite.default_names
    chosen = tuple(names.split(","))
    unknown = sorted(set(chosen) - set(suite.names))
    if unknown:
        raise ValueError(f"--names {unknown} are not benchmarks of suite {suite_name!r}; there are {list(suite.names)}")
    return chosen


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "gpu"), default="cpu")
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
    """Runs the suite name by name, rewriting the JSON after each; returns the tables."""
    entries: list[dict[str, typing.Any]] = []
    suite = SUITES[args.suite]()
    with tempfile.TemporaryDirectory(prefix="gpsd-bench-") as folder:
        for name in names:
            begin = time.perf_counter()
            entries += suite.measure(name, args.seconds, args.data_root, pathlib.Path(folder))
            args.out.write_text(json.dumps(entries, indent=1) + "\n")
            console.print(f"{name}: done in {time.perf_counter() - begin:.0f} s")
    return suite.tables(entries)


def main(argv: list[str]) -> int:
    """Returns the exit status, 2 for a wrong name."""
    args = _arguments(argv)
    if args.suite == "gpu":
        from benchmarks import gpu_suite

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
