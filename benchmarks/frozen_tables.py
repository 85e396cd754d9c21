"""What freezing the item table saves, by the size of the table."""

import dataclasses
import pathlib
import statistics

from benchmarks.datasets import SOURCES, prepare_synthetic
from benchmarks.remote import interleave, running
from benchmarks.sides import SIZES, SideSpec
from benchmarks.tables import Table

ROWS = {"frozen/1m": 1_000_000, "frozen/10m": 10_000_000}
_SIDES = {"trainable": "product", "frozen": "product + frozen item table"}
_SIZE = "h64"
_SPLIT_STEPS = 20
_TABLE_PHASES = ("lookup", "table backward + update")


def measure(name: str, seconds: float, data_root: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """One entry: step of a ranking model with a frozen item table over that with a trained one, Grocery lengths,
    item ids by Zipf's law over all rows.
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
    ratios = [f.step_cpu_ms / t.step_cpu_ms for f, t in zip(blocks["frozen"], blocks["trainable"], strict=True)]
    entry: dict = {"name": name, "rows": ROWS[name], "ratio": statistics.median(ratios)}
    entry |= {"ratio_min": min(ratios), "ratio_max": max(ratios), "pairs": len(ratios)}
    for label in _SIDES:
        entry[f"{label}_step_cpu_ms"] = statistics.median(block.step_cpu_ms for block in blocks[label])
        entry[f"{label}_table_ms"] = sum(facts[label].step_split_ms.get(phase, 0.0) for phase in _TABLE_PHASES)
        entry[f"{label}_table_bytes_per_step"] = facts[label].table_bytes
        entry[f"{label}_peak_mib"] = facts[label].peak_mib
    return [entry | {"start_up_lines": facts["frozen"].tables_report}]


def tables(entries: list[dict]) -> list[Table]:
    """Whole step, and the part of it that the tables cost."""
    table = Table(
        "Step with a frozen item table over that with a trained one (L4H64A4, 512 Grocery-like requests)",
        (
            "name",
            "step, frozen / trained",
            "min - max (pairs)",
            "step CPU ms, frozen and trained",
            "lookup + update ms",
            "table bytes per step",
            "peak MiB",
        ),
    )
    for entry in entries:
        both = [[entry[f"{label}_{key}"] for label in ("frozen", "trainable")] for key in _COLUMNS]
        table.add(
            entry["name"],
            f"**{entry['ratio']:.2f}**",
            f"{entry['ratio_min']:.2f} - {entry['ratio_max']:.2f} ({entry['pairs']})",
            "{:.1f}, {:.1f}".format(*both[0]),
            "{:.1f}, {:.1f}".format(*both[1]),
            "{:.1f}, {:.1f} MiB".format(*(value / 2**20 for value in both[2])),
            "{:,.0f}, {:,.0f}".format(*both[3]),
        )
    return [table]


_COLUMNS = ("step_cpu_ms", "table_ms", "table_bytes_per_step", "peak_mib")
