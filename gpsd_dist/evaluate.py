"""ENTRY: scores one split with a trained run, or with a baseline that needs no model, and writes one JSON file.

    python -m gpsd_dist.evaluate --checkpoint runs/kr/st_sf --data data/kuairand --split test --metrics_out test.json
    python -m gpsd_dist.evaluate --baseline gbdt --data data/kuairand --split test

A finetuned run gives {"<task>": {"auc", "gauc", "gauc_user_day", "log_loss", "ne", ...}}, with half of the 95 %
interval over users ("+-"); the file also has a "breakdown", which the report draws: calibration, AUC by history
length, new items and days. A pretrained run gives {"next_item": {"hr@10", "ndcg@10", "mrr", ...}}: exact ranks, or with
--rank_cut 2500 those of HSTU's authors, which changes the MRR alone. --min_item_count 5 adds the AUC on candidates
with five pretraining events or more. Also runs under torchrun, with the same result.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.evaluate ...")

import argparse
import math
import pathlib
import typing

from gpsd_dist.baselines.registry import NAMES, NEXT_ITEM
from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import say_error

if typing.TYPE_CHECKING:
    from gpsd_dist.metrics.classification import Predictions
    from gpsd_dist.stages.stage import Metrics


def _print(metrics: dict[str, dict[str, typing.Any]]) -> None:
    import rich.table

    from gpsd_dist.disk.console import Console
    from gpsd_dist.metrics import breakdown

    for task, values in metrics.items():
        widths = values.get(breakdown.KEY, {}).get("half_width", {})
        widths = {name: width for name, width in widths.items() if not math.isnan(width)}  # rows of one user have none
        table = rich.table.Table("metric", task, *["+-"] * bool(widths))
        for name, value in values.items():
            if name != breakdown.KEY:
                cells = [f"{widths[name]:.5f}" if name in widths else ""] * bool(widths)
                table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.5f}", *cells)
        Console().print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the options; ends the program with status 2 for those that cannot be meant."""
    parser = Parser(prog="python -m gpsd_dist.evaluate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    scorer = parser.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--checkpoint", help="run folder, or one checkpoint in it; or the URL of one")
    scorer.add_argument("--baseline", choices=sorted(NAMES), help="score without a model")
    which_help = "checkpoint of a run folder (best on valid)"
    parser.add_argument("--which", choices=("best", "last"), default="best", help=which_help)
    parser.add_argument("--data", help="prepared data; default: the data the run was trained on")
    parser.add_argument("--split", default="test", help="split to score (default: test)")
    parser.add_argument("--rank_cut", type=int, help="next item: worse ranks count as this + 1 (HSTU: 2500)")
    history_help = (
        f"{NEXT_ITEM}: events that do not compete, as a model with this option sees them (default: all stored)"
    )
    parser.add_argument("--max_history_length", type=int, help=history_help)
    window_help = f"{NEXT_ITEM}: count events of this many days before the request (default: all of split pretrain)"
    parser.add_argument("--window_days", type=float, help=window_help)
    count_help = "also give the AUC on candidates with at least this many events in split pretrain (k-core data: k)"
    parser.add_argument("--min_item_count", type=int, help=count_help)
    weighted_help = "metrics count a candidate as often as its weight in the data says"
    parser.add_argument("--weighted", action="store_true", help=weighted_help)
    parser.add_argument("--metrics_out", type=pathlib.Path, help="JSON file to write")
    scores_help = "Parquet file to write: task, user_hash, label and score of every candidate"
    parser.add_argument("--scores_out", type=pathlib.Path, help=scores_help)
    args = parser.parse_args(argv)
    if args.baseline and not args.data:
        parser.error("--baseline needs --data")
    if args.rank_cut is not None and (args.baseline not in (None, NEXT_ITEM) or args.rank_cut < 1):
        parser.error(f"--rank_cut {args.rank_cut} must be at least 1, and goes with --checkpoint or {NEXT_ITEM}")
    if args.max_history_length is not None and (args.baseline != NEXT_ITEM or args.max_history_length < 1):
        parser.error(f"--max_history_length {args.max_history_length} must be at least 1, and goes with {NEXT_ITEM}")
    if args.window_days is not None and (args.baseline != NEXT_ITEM or not args.window_days > 0):
        parser.error(f"--window_days {args.window_days} must be above 0, and goes with {NEXT_ITEM}")
    if args.weighted and args.baseline == NEXT_ITEM:
        parser.error(f"{NEXT_ITEM} ranks items, which have no sample weights: leave out --weighted")
    if args.min_item_count is not None and args.min_item_count < 1:
        parser.error(f"--min_item_count {args.min_item_count} must be at least 1")
    if (args.scores_out or args.min_item_count) and args.baseline == NEXT_ITEM:
        parser.error(f"{NEXT_ITEM} ranks items and scores no candidates: leave out --scores_out and --min_item_count")
    return args


def main(argv: list[str]) -> int:
    """Returns 0, or 2 for a mistake in the options or the data."""
    args = parse(argv)
    keep: dict[str, Predictions] = {}
    try:
        metrics = _of_baseline(args, keep) if args.baseline else _of_checkpoint(args, keep)
        if metrics is not None:
            from gpsd_dist.trained_run import with_breakdown, write_results

            detailed = with_breakdown(metrics, keep)
            _print(detailed)
            write_results(detailed, args.metrics_out, keep, args.scores_out)
        return 0
    except (ValueError, OSError) as error:
        return say_error(error)


def _of_baseline(args: argparse.Namespace, keep: "dict[str, Predictions]") -> "Metrics":
    from gpsd_dist.baselines.registry import evaluate_baseline
    from gpsd_dist.data import data_versions
    from gpsd_dist.trained_run import with_frequent_items

    data_dir = str(data_versions.opened(args.data))
    metrics = evaluate_baseline(
        args.baseline,
        data_dir,
        args.split,
        rank_cut=args.rank_cut,
        max_history_length=args.max_history_length,
        window_days=args.window_days,
        keep=keep,
        is_weighted=args.weighted,
    )
    return with_frequent_items(metrics, data_dir, keep, args.min_item_count)


def _of_checkpoint(args: argparse.Namespace, keep: "dict[str, Predictions]") -> "Metrics | None":
    """Returns None on ranks other than 0."""
    from gpsd_dist.distributed.runtime import process_group
    from gpsd_dist.trained_run import TIMEOUT_S, evaluate_checkpoint

    with process_group(TIMEOUT_S) as runtime:
        metrics = evaluate_checkpoint(
            args.checkpoint,
            args.data,
            args.split,
            runtime,
            args.which,
            rank_cut=args.rank_cut,
            keep=keep,
            must_keep=bool(args.scores_out or args.min_item_count),
            is_weighted=args.weighted,
            min_item_count=args.min_item_count,
        )
    return metrics if runtime.is_main else None


if __name__ == "__main__":
    sys.exit(run_main(main))
