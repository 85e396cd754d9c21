"""Averages finished runs over seeds: `python -m benchmarks.collect runs/grocery --metrics auc log_loss`.

Expects FOLDER/s<seed>/<strategy>/test.json, as `gpsd_dist.evaluate --metrics_out` writes them, and prints Markdown.
"""

import argparse
import json
import pathlib
import statistics

ORDER = ("nt", "st", "ft", "st_sf", "ft_sf")


def table(folder: pathlib.Path, metrics: list[str], name: str) -> list[str]:
    """Makes lines of a Markdown table, one row per strategy and task: mean, (min - max) over seeds."""
    lines = ["| strategy | task | seeds | " + " | ".join(metrics) + " |", "|---" * (3 + len(metrics)) + "|"]
    for strategy in ORDER:
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"s*/{strategy}/{name}"))]
        for task in found[0] if found else ():
            cells = [_cell([result[task][metric] for result in found]) for metric in metrics]
            lines.append(f"| {strategy.upper()} | {task} | {len(found)} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ({min(values):.4f} - {max(values):.4f})"


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--metrics", nargs="+", default=["auc", "gauc", "log_loss"])
    parser.add_argument("--name", default="test.json", help="file of each run (default test.json)")
    args = parser.parse_args()
    print("\n".join(table(args.folder, args.metrics, args.name)))


if __name__ == "__main__":
    main()
