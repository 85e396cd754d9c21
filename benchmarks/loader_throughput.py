"""Tokens per second from Parquet to a gathered table batch, by the loader on one CPU core.

    python -m benchmarks.loader_throughput [--rows 400000] [--passes 3]

Synthetic split: history length geometric with mean 46, three int64 list columns, row groups of 4096 rows, batches of
4096 rows. No collate. `per CPU-second` counts the time of all threads of the process. The cache of decoded row groups
is off ("cold": every row group is decoded, those on a shard boundary twice, 15 % more here) or on ("cached": rows are
only gathered). "checked": pages have checksums, as data_pipeline writes them, and each is compared when it is decoded.
"""

import argparse
import itertools
import pathlib
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist import schema
from gpsd_dist.data.loader import Loader

COLUMNS = ["history_length", "history.item", "history.category", "history.time_s"]


def write_split(data_dir: pathlib.Path, num_rows: int, compression: str, has_checksums: bool) -> schema.Manifest:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 46, num_rows), 400)
    num_tokens = int(lengths.sum())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    item = np.minimum(rng.zipf(1.2, num_tokens), 200_000).astype(np.int64)
    values = {
        "history.item": item,
        "history.category": item % 1000,
        "history.time_s": 1_600_000_000 + rng.integers(0, 10_000_000, num_tokens),
    }
    places = ("history", "candidate")
    manifest = schema.Manifest(
        source="benchmark",
        features=tuple(schema.Feature(name, places, table=name) for name in ("item", "category")),
        tables=(schema.Table("item", 200_002, ""), schema.Table("category", 1002, "")),
        tasks=(),
        splits=(schema.Split("pretrain", (f"{compression}.parquet",), num_rows, num_tokens, 0, None, None),),
        max_history_length=400,
    )
    columns = {name: pa.ListArray.from_arrays(offsets, pa.array(value)) for name, value in values.items()}
    columns["user_id"] = pa.array([f"user-{row}" for row in range(num_rows)])
    columns["user_hash"] = pa.array(np.arange(num_rows))
    columns["history_length"] = pa.array(lengths.astype(np.int32))
    table = pa.table(columns).select(schema.arrow_schema(manifest, "pretrain").names)
    options = {"compression": compression, "row_group_size": 4096, "write_page_checksum": has_checksums}
    pq.write_table(table, data_dir / f"{compression}.parquet", **options)
    return manifest


def report(num_rows: int, num_passes: int) -> None:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory() as folder:
        for compression, has_checksums in itertools.product(("zstd", "lz4", "none"), (True, False)):
            manifest = write_split(pathlib.Path(folder), num_rows, compression, has_checksums)
            num_tokens = manifest.splits[0].num_history_tokens
            for cache_bytes, label in ((0, "cold"), (2**30, "cached"))[: 2 if has_checksums else 1]:
                options = {"global_batch_rows": 4096, "columns": COLUMNS, "cache_bytes": cache_bytes}
                loader = Loader(folder, manifest, "pretrain", make_batch=lambda table, key: table.num_rows, **options)
                cpu_s, wall_s = [], []
                for _ in range(num_passes + (cache_bytes > 0)):
                    cpu, wall = time.process_time(), time.perf_counter()
                    assert sum(loader) == num_rows
                    cpu_s.append(time.process_time() - cpu)
                    wall_s.append(time.perf_counter() - wall)
                pages = "checked" if has_checksums else "unchecked"
                print(
                    f"{compression:5s} {label:7s} {pages:9s} "
                    f"{num_tokens / min(cpu_s) / 1e6:6.1f} M tokens per CPU-second, "
                    f"{num_tokens / min(wall_s) / 1e6:6.1f} M tokens/s (best of {len(cpu_s)} passes)"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--passes", type=int, default=3)
    args = parser.parse_args()
    report(args.rows, args.passes)


if __name__ == "__main__":
    main()
