"""Measures how evenly batches counted in tokens fall on ranks: the largest rank's tokens over the mean, over the steps
of an epoch.

    python -m benchmarks.token_balance [--data_root data] [--names grocery/train,kuairand/pretrain]

Arithmetic on history lengths: reads one column, trains nothing. `equal rows` is how shards were cut before.
"""

import argparse
import pathlib
import sys

import numpy as np

from gpsd_dist.data import data_versions, row_order
from gpsd_dist.data.epoch_reader import EpochReader
from gpsd_dist.data.loader import DEFAULT_NUM_DATA_SHARDS, MAX_WINDOW_ROWS, WINDOW_ROW_GROUPS
from gpsd_dist.data.parquet_dataset import ParquetSplit
from gpsd_dist.schema import read_manifest

NAMES = ("grocery/pretrain", "grocery/train", "kuairand/pretrain", "kuairand/train")
CASES = ((16_384, 2), (16_384, 8), (65_536, 8), (65_536, 16))  # (tokens of a step, ranks)


def excess(split: ParquetSplit, global_tokens: int, world_size: int, by_tokens: bool) -> np.ndarray:
    """Computes for each step, float64 [steps], tokens of the fullest rank over the mean of all ranks, minus 1."""
    weight_G, num_tokens = split.token_weights(None)
    window = min(round(WINDOW_ROW_GROUPS * split.num_rows / len(split.groups)), MAX_WINDOW_ROWS)
    order = row_order.EpochOrder(
        split.group_rows_G,
        0,
        DEFAULT_NUM_DATA_SHARDS,
        window,
        0,
        True,
        weight_G if by_tokens else None,
        lambda group: np.maximum(split.read_history_length(group), 1),
    )
    num_steps = max(1, -(-num_tokens // global_tokens))
    reader = EpochReader(split, order, range(DEFAULT_NUM_DATA_SHARDS), num_steps, by_tokens=True)
    tokens = np.zeros((world_size, num_steps))
    for shard in range(DEFAULT_NUM_DATA_SHARDS):
        weight = reader._weights(shard)
        cuts = row_order.cuts_by_weight(weight, num_steps)
        tokens[shard % world_size] += np.diff(np.concatenate([[0], np.cumsum(weight)])[cuts])
    return tokens.max(0) / tokens.mean(0) - 1


def main(argv: list[str]) -> int:
    """Prints one line per data set and case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--names", default=",".join(NAMES))
    args = parser.parse_args(argv)
    for name in args.names.split(","):
        folder, split_name = name.split("/")
        folder = data_versions.opened(args.data_root / folder)
        split = ParquetSplit(folder, read_manifest(folder), split_name, ["history_length"])
        for global_tokens, world_size in CASES:
            found = []
            for label, by_tokens in (("equal rows", False), ("equal tokens", True)):
                above = 100 * excess(split, global_tokens, world_size, by_tokens)
                found.append(f"{label}: mean {above.mean():.1f} %, largest {above.max():.1f} %")
            print(f"{name}, {global_tokens} tokens a step, {world_size} ranks; {'; '.join(found)}")
        split.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
