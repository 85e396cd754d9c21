"""Compares the product with the baseline, and with itself when one optimisation is switched off."""

import pathlib
import statistics
import time

import torch

from benchmarks.datasets import CANDIDATES_PER_ROW, BenchData, prepare
from benchmarks.remote import Block, Facts, interleave, running
from benchmarks.sides import SIZES, VARIANTS, SideSpec, Size, variants_of
from benchmarks.step_split import split_table
from benchmarks.tables import Table
from gpsd_dist.model.ops.products import has_bf16_products
from gpsd_dist.model.transformer import ffn_width

_SPLIT_STEPS = 20
_LARGE_ROWS, _LARGE_SPLIT_STEPS, _LARGE_BLOCK_S = 16, 4, 10.0
"""Of sizes that take seconds for a few requests: requests per step on both sides, steps that are split, and about how
many CPU seconds a turn takes (at least one step).
"""
_NEGATIVES = 4096


def batch_rows(data: BenchData, size: Size, *, is_baseline: bool) -> int:
    """Chooses requests per step: the official batch; less for the baseline's wide pretraining, whose [B, N, D]
    negatives would not fit into an ordinary machine (its cost per token hardly depends on it), and on both sides for
    large towers.
    """
    if _is_large(size):
        return _LARGE_ROWS
    if data.split != "pretrain" or not is_baseline:
        return data.source.batch_rows
    return min(data.source.batch_rows, 512 * 64 // size.width)


def _is_large(size: Size) -> bool:
    return size.layers * size.width > 4 * 256


def _spec(variant: str, data: BenchData, size: Size, folder: pathlib.Path) -> SideSpec:
    rows = batch_rows(data, size, is_baseline=variant.startswith("baseline"))
    return SideSpec(
        variant, data, size, rows, folder / f"{data.data_dir.name}-{size.width}-{variant.replace(' ', '_')}"
    )


def _products(name: str, size: Size) -> dict[str, str]:
    """Maps the name of each entry to its variant. Pretraining is measured with the product's default negatives, too,
    but for towers so large that three sides do not fit into memory.
    """
    products = {name: "product"}
    if name.startswith("pretrain/") and not _is_large(size):
        products[f"{name}/default_negatives"] = "product, 8 x 1024 negatives"
    return products


def against_baseline(name: str, seconds: float, data_root: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """Measures the entries of bench.json for one name, one per product of `_products`."""
    kind, data_name, size_name = name.split("/")
    data, size = prepare(kind, data_name, data_root, folder), SIZES[size_name]
    is_large, labels = _is_large(size), _products(name, size)
    entries = []
    specs = {variant: _spec(variant, data, size, folder) for variant in ("baseline", *labels.values())}
    with running(specs) as sides:
        blocks = interleave(sides, seconds, shortest_s=_LARGE_BLOCK_S if is_large else 2.0)
        steps = _LARGE_SPLIT_STEPS if is_large else _SPLIT_STEPS
        baseline_facts = sides["baseline"].facts(0)
        for label, variant in labels.items():
            entry = _entry(label, blocks["baseline"], blocks[variant])
            entry |= {"data": data.note, "batch_requests": specs[variant].batch_rows}
            entry |= {"baseline_batch_requests": specs["baseline"].batch_rows}
            if kind == "pretrain":
                entry["negatives"] = "8 x 1024 shared" if "1024" in variant else f"8 x {_NEGATIVES} shared"
                entry["baseline_negatives"] = f"{_NEGATIVES} per sequence"
            facts = sides[variant].facts(steps)
            entry |= _facts(facts, blocks[variant], specs[variant], baseline_facts)
            if size.layers * size.width >= 4 * 256:
                negatives = 0 if kind != "pretrain" else 1024 if "1024" in variant else _NEGATIVES
                candidates_per_s = CANDIDATES_PER_ROW[kind] * entry["examples_per_cpu_s"]
                entry |= _utilisation(size, negatives, entry["tokens_per_cpu_s"], candidates_per_s)
            entries.append(entry)
    return entries


def _entry(name: str, baseline: list[Block], other: list[Block]) -> dict:
    """Computes the ratio of tokens per CPU-second: median over rounds, smallest and largest."""
    ratios = [p.tokens_per_cpu_s / b.tokens_per_cpu_s for p, b in zip(other, baseline, strict=True)]
    everything = other + baseline
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "tokens_per_cpu_s": statistics.median(block.tokens_per_cpu_s for block in other),
        "baseline_tokens_per_cpu_s": statistics.median(block.tokens_per_cpu_s for block in baseline),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": len(ratios),
        "product_cpu_s": sum(block.cpu_s for block in other),
        "baseline_cpu_s": sum(block.cpu_s for block in baseline),
        "cpu_share": sum(b.cpu_s for b in everything) / sum(b.wall_s for b in everything),
    }


def _facts(facts: Facts, blocks: list[Block], spec: SideSpec, baseline: Facts) -> dict:
    step_ms = statistics.median(block.step_cpu_ms for block in blocks)
    return {
        "examples_per_cpu_s": 1000 * spec.batch_rows / step_ms,
        "step_cpu_ms": step_ms,
        "step_split_ms": facts.step_split_ms,
        "peak_mib": facts.peak_mib,
        "baseline_peak_mib": baseline.peak_mib,
        "table_bytes_per_step": facts.table_bytes,
    }


def _model_flops(size: Size, negatives: int, tokens: float, candidates: float) -> float:
    """Counts FLOPs of linear layers over history tokens and candidates, item softmax over history tokens; forward and
    backward.
    """
    layer = 4 * size.width**2 + 3 * size.width * ffn_width(size.width)
    return 6 * (size.layers * layer * (tokens + candidates) + negatives * size.width * tokens)


def _utilisation(size: Size, negatives: int, tokens_per_s: float, candidates_per_s: float) -> dict:
    """Divides model FLOP/s by those that a large matrix product reaches on this core at this moment."""
    torch.set_num_threads(1)
    left, right = torch.randn(2048, 1024), torch.randn(1024, 2048)
    torch.mm(left, right)
    best_s = min(_timed_product(left, right) for _ in range(5))
    peak = 2 * 2048 * 1024 * 2048 / best_s
    flops_per_s = _model_flops(size, negatives, tokens_per_s, candidates_per_s)
    return {"mfu": flops_per_s / peak, "peak_gflops": peak / 1e9}


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> float:
    begin = time.process_time()
    torch.mm(left, right)
    return time.process_time() - begin


def ablation(name: str, seconds: float, data_root: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """Makes one entry per variant; `of_product` compares its step with the whole product's, `ratio` its tokens with the
    baseline's. `seconds` are CPU seconds per variant; two sides and the variant run at a time, for their memory.
    """
    kind, data_name, size_name = name.split("/")
    data, size = prepare(kind, data_name, data_root, folder), SIZES[size_name]
    entries = []
    for variant in variants_of(kind):
        if variant in ("baseline", "product") or " in " in variant:  # kinds of frozen tables: suite `frozen`
            continue
        if "bf16" in variant and not has_bf16_products():
            continue  # such a run is refused there
        specs = {v: _spec(v, data, size, folder) for v in ("baseline", "product", variant)}
        with running(specs) as sides:
            blocks = interleave(sides, 3 * seconds / 2, shortest_s=1.0)
        entry = _entry(f"{name}: {variant}", blocks["baseline"], blocks[variant])
        of_product = _entry("", blocks["product"], blocks[variant])
        entry |= {f"of_product{end}": of_product[f"ratio{end}"] for end in ("", "_min", "_max")}
        entry["product_ratio"] = _entry("", blocks["baseline"], blocks["product"])["ratio"]
        entries.append(entry | {"meaning": VARIANTS[variant]})
    return entries


def ablation_tables(entries: list[dict]) -> list[Table]:
    """Makes one table per name."""
    tables = []
    for name in dict.fromkeys(entry["name"].split(": ")[0] for entry in entries):
        table = Table(
            f"{name}, real tokens per CPU-second over those of the baseline and of the whole product",
            ("variant", "what is switched", "of the baseline", "min - max", "of the product", "min - max"),
        )
        table.add("baseline", VARIANTS["baseline"], "1.0x", "", "", "")
        chosen = [entry for entry in entries if entry["name"].startswith(f"{name}: ")]
        product = statistics.median(entry["product_ratio"] for entry in chosen)
        for entry in chosen:
            variant = entry["name"].split(": ")[1]
            if not variant.startswith("baseline") and table.rows[-1][0].startswith("baseline"):
                table.add("product", VARIANTS["product"], f"{product:.1f}x", "", "1.00", "")
            table.add(
                variant,
                entry["meaning"],
                f"{entry['ratio']:.1f}x",
                f"{entry['ratio_min']:.1f} - {entry['ratio_max']:.1f}",
                f"{entry['of_product']:.2f}",
                f"{entry['of_product_min']:.2f} - {entry['of_product_max']:.2f}",
            )
        tables.append(table)
    return tables


def comparison_tables(entries: list[dict]) -> list[Table]:
    """Makes tables of ratios, of the phases of the product's step and of its memory."""
    ratios = Table(
        "Real tokens per CPU-second, product against padded baseline (requests / step: of both; / CPU-s: the product)",
        ("name", "ratio", "min - max (pairs)", "product", "baseline", "requests / step", "requests / CPU-s", "MFU"),
    )
    memory = Table(
        "Memory of the process and table rows moved per step",
        ("name", "peak, product", "peak, baseline", "table bytes per step"),
    )
    for entry in entries:
        ratios.add(
            entry["name"],
            f"**{entry['ratio']:.1f}x**",
            f"{entry['ratio_min']:.1f} - {entry['ratio_max']:.1f} ({entry['pairs']})",
            f"{entry['tokens_per_cpu_s']:,.0f}",
            f"{entry['baseline_tokens_per_cpu_s']:,.0f}",
            f"{entry['batch_requests']} / {entry['baseline_batch_requests']}",
            f"{entry['examples_per_cpu_s']:,.0f}",
            f"{entry['mfu']:.0%} of {entry['peak_gflops']:.0f} GFLOP/s" if "mfu" in entry else "",
        )
        megabytes = entry["table_bytes_per_step"] / 2**20
        memory.add(
            entry["name"],
            f"{entry['peak_mib']:,.0f} MiB",
            f"{entry['baseline_peak_mib']:,.0f} MiB",
            f"{megabytes:.1f} MiB",
        )
    splits = {entry["name"]: entry["step_split_ms"] for entry in entries}
    return [ratios, split_table("Phases of the product's step, ms", splits), memory]
