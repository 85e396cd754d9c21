"""Gives the held-out loss of pretrained runs over their size, and the training loss over the data seen.

    python -m benchmarks.pretraining_loss 'runs/scaling/*/s*/pretrain'      # folders, or patterns of folders

The loss of a run is -log p(target) of the event that each request of `valid` hides, with all known items competing at
the temperature of training: nats, the mean over the targets, for the checkpoint with the best `valid` MRR. A target out
of the vocabulary does not count. With four sizes or more the law loss = c + a x^-b is fitted over the dense parameters
x, as `gpsd_dist.scaling` fits AUC. The second table is the training loss within the first epoch, where no history was
seen before: sampled negatives and dropout are in it, so it is another quantity than the first.
Shape letters: C candidates, E embedding width, P targets, R items.
"""

import argparse
import collections.abc
import glob
import json
import pathlib
import statistics
import sys

import torch
import torch.nn.functional as F

from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.distributed.runtime import Runtime, process_group
from gpsd_dist.scaling.fit import MIN_SIZES, Law, fit_law
from gpsd_dist.scaling.runs import parameters_of
from gpsd_dist.schema import NUM_RESERVED_ROWS
from gpsd_dist.stages import losses
from gpsd_dist.trained_run import TIMEOUT_S, TrainedRun, load_trained

_LAW = Law("loss", 1, 20.0)


@torch.no_grad()
def held_out_loss(trained: TrainedRun, runtime: Runtime) -> float:
    """Computes the mean of -log p(target) in nats over `valid`. One process; tables that are no managed ids."""
    run, manifest, components = trained.run, trained.manifest, trained.components
    components.model.eval()
    table = manifest.feature(manifest.item_feature).table
    unit_RE = losses.unit(components.tables.weights()[table].local_tensor()[NUM_RESERVED_ROWS:])
    total, count = 0.0, 0
    for (batch,) in evaluation_loader(run, manifest, components.lookup_names, "valid", runtime):
        hidden_TE = components.model(components.tables(batch.lookup), batch).hidden_TE
        offsets = batch.packing.history_offsets
        target_C = batch.candidate_item_C
        is_scored_C = (batch.labels[manifest.tasks[0].name] == 1) & (target_C >= NUM_RESERVED_ROWS)
        is_scored_C &= (offsets.diff() > 0)[batch.packing.request_C]
        last_P = offsets[1:][batch.packing.request_C[is_scored_C]] - 1
        logits_PR = losses.unit(hidden_TE[last_P]) @ unit_RE.t() / run.pretrain.temperature
        total += float(F.cross_entropy(logits_PR, target_C[is_scored_C] - NUM_RESERVED_ROWS, reduction="sum"))
        count += len(last_P)
    return total / count


def first_epoch(folder: pathlib.Path) -> list[tuple[float, float]]:
    """Reads (share of the epoch, training loss of the next item) at each log step of the first epoch."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(e["epoch"], e["train/next_item_loss"]) for e in entries if "train/next_item_loss" in e and e["epoch"] <= 1]


def folders_of(patterns: collections.abc.Iterable[str]) -> list[pathlib.Path]:
    """Expands the patterns. ValueError where one fits nothing."""
    found = []
    for pattern in patterns:
        folders = sorted(glob.glob(pattern))
        if not folders:
            raise ValueError(f"{pattern}: no such folder")
        found += [pathlib.Path(folder) for folder in folders]
    return found


def main(argv: list[str]) -> int:
    """Prints Markdown; returns 0, or 2 for a mistake in the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining_loss", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", help="folders of finished pretrainings")
    args = parser.parse_args(argv)
    by_size: dict[int, list[float]] = {}
    curves: dict[int, list[tuple[float, float]]] = {}
    try:
        for folder in folders_of(args.runs):
            size = parameters_of(folder)["dense_parameters"]
            with process_group(TIMEOUT_S) as runtime:
                by_size.setdefault(size, []).append(
                    held_out_loss(load_trained(folder, None, "valid", runtime), runtime)
                )
            curves.setdefault(size, first_epoch(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| dense parameters | runs | loss on valid, nats | min - max |\n|--:|--:|--:|--:|")
    for size, values in sorted(by_size.items()):
        print(f"| {size:,} | {len(values)} | {statistics.mean(values):.4f} | {min(values):.4f} - {max(values):.4f} |")
    x, y = zip(*((size, value) for size, values in by_size.items() for value in values), strict=True)
    fit = fit_law(_LAW, list(x), list(y))
    if fit is None:
        print(f"\nno fit: {len(by_size)} sizes, {MIN_SIZES} needed")
    else:
        ends = ", ".join(f"{name} {low:.4g} - {high:.4g}" for name, (low, high) in fit.intervals().items())
        print(f"\n{fit.law.formula}: c {fit.c:.4f}, a {fit.a:.4g}, b {fit.b:.4f}; 95 %: {ends}; R^2 {fit.r2():.3f}")
        print(*(f"not determined: {what}" for what in fit.not_determined()), sep="\n")
    print("\n| dense parameters | share of the first epoch: training loss |\n|--:|---|")
    for size, points in sorted(curves.items()):
        print(f"| {size:,} | " + ", ".join(f"{share:.2f}: {loss:.3f}" for share, loss in points) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
