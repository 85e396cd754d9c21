"""Measures the CPU time of managed ids in a training step: one update and one lookup of a full map, by rows of the
table.

    python -m benchmarks.id_map_update

Ids are Zipf-distributed over ten times as many as there are rows, so that every step admits and evicts.
"""

import statistics
import time

import numpy as np
import torch

from gpsd_dist.config.ids import EVICTIONS, IdsConfig
from gpsd_dist.tables.managed_collision import ManagedCollisionMap

SIZES = (10_000, 100_000, 1_000_000)
TOKENS = 30_000  # of a global batch of 512 requests with 50 events and 10 candidates, about
STEPS = 9


def milliseconds(num_rows: int, eviction: str) -> tuple[float, float, float]:
    """Measures CPU time: (median, smallest, largest) over STEPS updates of a full map."""
    managed = ManagedCollisionMap(num_rows, IdsConfig(admission_threshold=2, eviction=eviction), torch.device("cpu"))
    random = np.random.default_rng(0)
    everyone = torch.arange(2, num_rows)
    managed.update(everyone, torch.full_like(everyone, 2))
    times = []
    for _ in range(STEPS):
        drawn = torch.from_numpy(2 + (random.zipf(1.2, TOKENS) * 7_919) % (10 * num_rows))
        ids, counts = drawn.unique(return_counts=True)
        begin = time.process_time()
        managed.update(ids, counts)
        managed.rows(ids)
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times), min(times), max(times)


def main() -> None:
    """Prints one line per size and policy."""
    torch.set_num_threads(1)
    for num_rows in SIZES:
        for eviction in EVICTIONS:
            median, low, high = milliseconds(num_rows, eviction)
            found = f"{median:8.1f} CPU ms per step ({low:.1f} - {high:.1f})"
            print(f"{num_rows:>9,} rows {eviction:<12} {found}", flush=True)


if __name__ == "__main__":
    main()
