"""Measures what freezing the item table saves, by the size of the table."""

import dataclasses
import pathlib
import statistics

from benchmarks.datasets import SOURCES, prepare_synthetic
from benchmarks.remote import interleave, running
from benchmarks.sides import SIZES, SideSpec
from benchmarks.tables import Table

ROWS = {"frozen/1m": 1_000_000, "frozen/10m": 10_000_000}
_FROZEN = "product + frozen item table"
_SIDES = {"trained": "product", "fp32": _FROZEN, "fp16": f"{_FROZEN} in fp16"}
_SIZE = "h64"
_SPLIT_STEPS = 20
_TABLE_PHASES = ("lookup", "table backward + update")


def measure(name: str, seconds: float, data_root: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """Measures one entry: the step of a ranking model with a frozen item table over that with a trained one, Grocery
    lengths, item ids by Zipf's law over all rows.
    """
    source = dataclasses.replace(SOURCES["grocery"], num_items=ROWS[name] - 2)
    data = prepare_synthetic("discriminative", name.replace("/", "-"), source, 1, folder)
    specs = {
        label: SideSpec(variant, data, SIZES[_SIZE], source.batch_rows, folder / f"{data.data_dir.name}-{label}")
        for label, variant in _SIDES.items()
    }
    with running(specs) as sides:
        blocks = interleave(sides, seconds)
        facts = {label: side.facts(_SPLIT_STEPS) for label, side in sides.items()}
    entries = []
    for label in _SIDES:
        found = blocks[label]
        ratios = [own.step_cpu_ms / t.step_cpu_ms for own, t in zip(found, blocks["trained"], strict=True)]
        entries.append(
            {
                "name": f"{name}/{label}",
                "rows": ROWS[name],
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "pairs": len(ratios),
                "step_cpu_ms": statistics.median(block.step_cpu_ms for block in found),
                "table_ms": sum(facts[label].step_split_ms["CPU"][phase] for phase in _TABLE_PHASES),
                "table_bytes_per_step": facts[label].table_bytes,
                "peak_mib": facts[label].peak_mib,
                "start_up_lines": facts[label].tables_report,
            }
        )
    return entries


def tables(entries: list[dict]) -> list[Table]:
    """Makes a table of whole steps and of the part that the tables cost."""
    table = Table(
        "Step of a ranking model by the fate of its item table (L4H64A4, 512 Grocery-like requests), CPU time",
        (
            "rows / table",
            "of trained",
            "min - max (pairs)",
            "step ms",
            "lookup + update ms",
            "MiB per step",
            "peak MiB",
        ),
    )
    for entry in entries:
        table.add(
            entry["name"],
            f"**{entry['ratio']:.2f}**",
            f"{entry['ratio_min']:.2f} - {entry['ratio_max']:.2f} ({entry['pairs']})",
            f"{entry['step_cpu_ms']:.1f}",
            f"{entry['table_ms']:.1f}",
            f"{entry['table_bytes_per_step'] / 2**20:.1f}",
            f"{entry['peak_mib']:,.0f}",
        )
    return [table]
