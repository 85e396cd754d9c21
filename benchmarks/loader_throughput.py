"""Measures tokens per second from Parquet to a gathered table batch, by the loader on one CPU core.

Synthetic split: history length geometric with mean 46, three int64 list columns, row groups of 4096 rows, batches of
4096 rows, encoded as data_pipeline writes them, with page checksums. `per CPU-second` counts the time of all threads
of the process. "decode": Arrow reads all row groups once, no loader; "cold": the caches of decoded row groups are off,
every row group is decoded, those on a shard boundary twice; "cached": rows are only gathered; "batch": cold, and
collated into a batch (sorted, checked, deduplicated, packed); "mapped": as batch, from the cache on disk, which the
first pass fills; that pass is named apart.
"""

import functools
import pathlib
import statistics
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.tables import Table
from data_pipeline.write import encodings
from gpsd_dist import schema
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.loader import BatchKey, Loader
from gpsd_dist.distributed.allocator import keep_freed_memory

COMPRESSIONS = ("loader/zstd", "loader/lz4", "loader/none")
_SETTINGS = {  # cache bytes, collated, bytes of the cache on disk
    "cold": (0, False, 0),
    "cached": (2**30, False, 0),
    "batch": (0, True, 0),
    "mapped": (0, True, 2**32),
}
_ROWS, _MIN_PASSES = 400_000, 3
COLUMNS = ["history_length", "history.item", "history.category", "history.time_s"]


def write_split(data_dir: pathlib.Path, num_rows: int, compression: str) -> schema.Manifest:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 46, num_rows), 400)
    num_tokens = int(lengths.sum())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    item = np.minimum(rng.zipf(1.2, num_tokens), 200_000).astype(np.int64)
    values = {
        "history.item": item,
        "history.category": 1 + item % 1000,
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
    path = data_dir / f"{compression}.parquet"
    options = {"compression": compression, "row_group_size": 4096, "write_page_checksum": True}
    pq.write_table(table, path, **options, **encodings(table.schema))
    return manifest


def measure(name: str, seconds: float, data_root: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """Measures the entries of one compression, named like it; every setting is measured in turn, `seconds` of CPU time
    in all.
    """
    compression = name.split("/")[1]
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    keep_freed_memory()  # as a run on CPU does
    folder = folder / compression
    folder.mkdir()
    manifest = write_split(folder, _ROWS, compression)
    num_tokens = manifest.splits[0].num_history_tokens
    loaders = {label: _loader(folder, manifest, *setting) for label, setting in _SETTINGS.items()}
    passes = {"decode": lambda: _decode(folder / manifest.splits[0].files[0])}
    passes |= {label: functools.partial(sum, loader) for label, loader in loaders.items()}
    cpu_s: dict[str, list[float]] = {label: [] for label in passes}
    start = time.process_time()
    assert passes["mapped"]() == _ROWS
    first = {"mapped, first pass": [time.process_time() - start]}
    begin = time.process_time()
    while time.process_time() - begin < seconds or len(cpu_s["cold"]) < _MIN_PASSES:
        for label, count_rows in passes.items():
            start = time.process_time()
            assert count_rows() == _ROWS
            cpu_s[label].append(time.process_time() - start)
    file_bytes = (folder / f"{compression}.parquet").stat().st_size
    return [
        {
            "name": f"{name}/{label}",
            "tokens_per_cpu_s": num_tokens / statistics.median(found),
            "tokens_per_cpu_s_max": num_tokens / min(found),
            "tokens_per_cpu_s_min": num_tokens / max(found),
            "passes": len(found),
            "bytes_per_token": file_bytes / num_tokens,
        }
        for label, found in (cpu_s | first).items()
    ]


def _decode(path: pathlib.Path) -> int:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        groups = range(file.num_row_groups)
        return sum(file.read_row_group(group, columns=COLUMNS, use_threads=False).num_rows for group in groups)


def _loader(
    folder: pathlib.Path, manifest: schema.Manifest, cache_bytes: int, is_collated: bool, disk_bytes: int
) -> Loader:
    collate = Collate(manifest, ("item", "category"), 400, with_candidates=False)

    def make_batch(rows: pa.Table, key: BatchKey) -> int:
        return sum(part.packing.num_requests for part in collate(rows, key)) if is_collated else rows.num_rows

    return Loader(
        folder,
        manifest,
        "pretrain",
        make_batch=make_batch,
        columns=collate.columns() if is_collated else COLUMNS,
        global_batch_rows=4096,
        cache_bytes=cache_bytes,
        disk_cache=(folder / "decoded", disk_bytes) if disk_bytes else None,
    )


def tables(entries: list[dict]) -> list[Table]:
    """Makes one row per compression and setting."""
    table = Table(
        "Loader, M tokens per CPU-second (three list columns, history mean 46, batches of 4096 rows)",
        ("compression / setting", "median", "min - max (passes)", "bytes per token"),
    )
    for entry in entries:
        speeds = [entry[f"tokens_per_cpu_s{end}"] / 1e6 for end in ("", "_min", "_max")]
        table.add(
            entry["name"],
            f"{speeds[0]:.1f}",
            f"{speeds[1]:.1f} - {speeds[2]:.1f} ({entry['passes']})",
            f"{entry['bytes_per_token']:.2f}",
        )
    return [table]
