"""Makes the tables of finished cells: shares at a glance, then a row per law and model."""

import collections
import collections.abc
import statistics

from benchmarks.laws.runs import BASELINES

Row = tuple[str, str, str]
"""Law, tower and strategy: its seeds are one row."""


def rows_of(records: collections.abc.Iterable[dict]) -> dict[Row, list[dict]]:
    """Groups records by row, in order of first appearance."""
    found: dict[Row, list[dict]] = {}
    for record in records:
        found.setdefault((record["law"], record["tower"], record["strategy"]), []).append(record)
    return found


def summary(records: list[dict]) -> dict:
    """Summarises the seeds of one row; `failed` says why, if any of them did."""
    failed = [record["failed"] for record in records if "failed" in record]
    if failed:
        return {"failed": failed[0], "seeds": len(records)}
    shares, first = [record["share"] for record in records], records[0]
    steps = [record["steps_to_near"] for record in records]
    return {
        "seeds": len(records),
        "task": first["task"],
        "ceiling": first["ceiling"],
        "auc": {split: statistics.fmean(r["auc"][split] for r in records) for split in ("valid", "test")},
        "share": statistics.fmean(shares),
        "share_spread": statistics.stdev(shares) if len(shares) > 1 else None,
        "valid_share": statistics.fmean(record["valid_share"] for record in records),
        "steps_to_near": None if None in steps else round(statistics.median(steps)),
        "cpu_s": statistics.fmean(record["cpu_s"] for record in records),
        "why_not": first["why_not"],
    }


def markdown(records: collections.abc.Sequence[dict]) -> str:
    """Writes all tables of the records."""
    found = {row: summary(seeds) for row, seeds in rows_of(records).items()}
    reasons = dict.fromkeys((law, s["why_not"]) for (law, _, _), s in found.items() if s.get("why_not"))
    lines = [_shares(found), "", *(f"- `{law}`: {reason}." for law, reason in reasons)]
    return "\n".join([*lines, *([""] if reasons else []), _details(found), ""])


def _shares(found: dict[Row, dict]) -> str:
    """Writes a line per law and a column per model.

    A share of one seed stands alone; of several seeds there are mean ± standard deviation, and their number. In
    brackets: the tower cannot express the law in full.
    """
    laws, models = (list(dict.fromkeys(key)) for key in zip(*((law, (t, s)) for law, t, s in found)))
    ceilings = {law: s["ceiling"]["test"] for (law, _, _), s in found.items() if "ceiling" in s}
    table = [["law", "ceiling", *(_name(*model) for model in models)], ["---", *("---:" for _ in [0, *models])]]
    for law in laws:
        most = f"{ceilings[law]:.3f}" if law in ceilings else ""
        table.append([f"`{law}`", most, *(_share(found.get((law, *model))) for model in models)])
    return _lines(table)


def _share(entry: dict | None) -> str:
    if entry is None:
        return ""
    if "failed" in entry:
        return "failed"
    text = f"{entry['share']:.2f}"
    if entry["share_spread"] is not None:
        text = f"{entry['share']:.3f} ± {entry['share_spread']:.3f}, {entry['seeds']}"
    return f"({text})" if entry["why_not"] else text


def _details(found: dict[Row, dict]) -> str:
    header = ["law", "model", "ceiling", "test AUC", "share", "spread", "valid share", "steps to 0.9", "CPU s", "seeds"]
    table = [header, ["---", "---", *("---:" for _ in header[2:])]]
    for (law, tower, strategy), entry in found.items():
        start = [f"`{law}`", _name(tower, strategy)]
        if "failed" in entry:
            table.append([*start, f"failed: {entry['failed']}", *([""] * (len(header) - 3))])
            continue
        spread = "" if entry["share_spread"] is None else f"{entry['share_spread']:.3f}"
        steps = "" if entry["steps_to_near"] is None else str(entry["steps_to_near"])
        numbers = (entry["ceiling"]["test"], entry["auc"]["test"])
        shares = [f"{entry['share']:.3f}", spread, f"{entry['valid_share']:.3f}", steps]
        table.append([*start, *(f"{n:.4f}" for n in numbers), *shares, f"{entry['cpu_s']:.1f}", str(entry["seeds"])])
    return _lines(table)


def _name(tower: str, strategy: str) -> str:
    return tower if tower in BASELINES else f"{tower} {strategy}"


def _lines(table: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)
