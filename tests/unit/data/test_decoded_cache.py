"""The cache of decoded row groups on disk: same rows, bounded, dropped with its data, harmless when it fails."""

import errno
import logging
import os
import pathlib
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist.data import decoded_cache
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.decoded_cache import base_folder, narrowed
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.parquet_dataset import ParquetSplit
from tests.unit.data.parquet_files import FILES, write_split

GIB = 2**30
NUM_GROUPS = sum(len(groups) for groups in FILES)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder, write_split(folder)


def rows_of(data, base, max_bytes=GIB, **options):
    """All row groups, read as one process does that keeps nothing in memory."""
    split = ParquetSplit(*data, "pretrain", cache_bytes=0, disk_cache=base and (base, max_bytes), **options)
    return [split.read_group(group).cast(split.schema) for group in range(len(split.groups))]


def files_in(base: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in base.rglob("*") if path.is_file())


def test_batches_are_the_same_with_and_without_and_after_a_resume(data, tmp_path):
    folder, manifest = data
    # Times of one file do not fit into int32; where its row groups meet others in a window, those are widened again.
    for file, time_s in zip(manifest.splits[0].files, (2**40, 1_000, 2_000, 3_000), strict=False):
        table = pq.read_table(folder / file)
        lengths = [range(length) for length in table["history_length"].to_pylist()]
        changed = {
            "history.item": [[1 + row % 50 for _ in entries] for row, entries in enumerate(lengths)],
            "history.tags": [[[1 + place % 7] for place in entries] for entries in lengths],
            "history.time_s": [[time_s + place for place in entries] for entries in lengths],
        }
        for name, values in changed.items():
            field = table.schema.field(name)
            table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
        pq.write_table(table, folder / file, row_group_size=5)
    collate = Collate(manifest, ("item",), 50, with_candidates=False)

    def batches(disk_cache, state=None, cut=None):
        loader = Loader(
            folder, manifest, "pretrain", make_batch=collate, columns=collate.columns(), global_batch_rows=10,
            num_data_shards=6, cache_bytes=0, disk_cache=disk_cache,
        )  # fmt: skip
        if state:
            loader.load_state_dict(state)
        made = []
        for (batch,) in loader:
            made.append((batch.history_item_T, batch.history_time_s_T, batch.user_hash_B, batch.lookup.values()))
            if len(made) == cut:
                break
        return made, loader.state_dict()

    plain, _ = batches(None)
    base = tmp_path / "cache"
    for _ in range(2):  # filled, then read
        made, _ = batches((base, GIB))
        assert len(made) == len(plain) and files_in(base)
        for one, two in zip(made, plain, strict=True):
            assert [value.dtype for value in one] == [value.dtype for value in two]
            assert all(a.equal(b) for a, b in zip(one, two, strict=True))
    begun, state = batches(None, cut=3)
    rest, _ = batches((base, GIB), state)
    assert all(a[2].equal(b[2]) for a, b in zip([*begun, *rest], plain, strict=True))


def test_what_stays_in_memory_leaves_no_file(data, tmp_path):
    split = ParquetSplit(*data, "pretrain", disk_cache=(tmp_path / "cache", GIB))
    for group in range(len(split.groups)):
        split.read_group(group)
    assert not files_in(tmp_path)[len(files_in(data[0])) :]


def test_a_second_reader_decodes_nothing(data, tmp_path, monkeypatch):
    first = rows_of(data, tmp_path / "cache")
    monkeypatch.setattr(ParquetSplit, "_decode", None)
    assert rows_of(data, tmp_path / "cache") == first


def test_a_damaged_file_is_decoded_again(data, tmp_path, caplog):
    first = rows_of(data, tmp_path / "cache")
    for path, change in zip(files_in(tmp_path / "cache"), (-40, 100, None), strict=False):
        content = bytearray(path.read_bytes())
        if change is not None:
            content[change] ^= 1
        path.write_bytes(content[: len(content) // 2] if change is None else content)
    assert rows_of(data, tmp_path / "cache") == first
    assert caplog.text.count("is decoded again") == 3
    caplog.clear()
    assert rows_of(data, tmp_path / "cache") == first and not caplog.records


def test_a_file_that_cannot_be_read_now_stays(data, tmp_path, caplog, monkeypatch):
    first, files = rows_of(data, tmp_path / "cache"), files_in(tmp_path / "cache")
    for error in (
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.ESTALE, "Stale"),
        pa.ArrowMemoryError(),
    ):

        def fail(path, error=error):
            raise error

        monkeypatch.setattr(pa, "memory_map", fail)
        assert rows_of(data, tmp_path / "cache") == first and files_in(tmp_path / "cache") == files
    assert caplog.text.count("is decoded again") == 3 * NUM_GROUPS


def test_a_folder_of_another_encoding_is_no_obstacle(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_bytes(b"a /m\xe9dia proc rw 0 0\nb / ext4 rw 0 0\n")
    monkeypatch.setattr(decoded_cache, "open", lambda _, **how: mounts.open(**how), raising=False)
    monkeypatch.setattr(decoded_cache, "_LOCAL", {"ext4"})
    assert decoded_cache._is_local(tmp_path) and not decoded_cache._is_local(pathlib.Path("/m\udce9dia"))


def test_files_of_a_file_server_are_read_and_not_mapped(data, tmp_path, monkeypatch):
    first = rows_of(data, tmp_path / "cache")
    assert decoded_cache._is_local(tmp_path / "not there yet")
    monkeypatch.setattr(decoded_cache, "_LOCAL", {"proc"})
    assert decoded_cache._is_local(pathlib.Path("/proc/self")) and not decoded_cache._is_local(tmp_path)
    monkeypatch.setattr(ParquetSplit, "_decode", None)
    monkeypatch.setattr(pa, "memory_map", None)
    assert rows_of(data, tmp_path / "cache") == first


def test_other_data_drop_the_files(data, tmp_path):
    base = tmp_path / "cache"
    rows_of(data, base)
    rows_of(data, base, columns=["user_hash"])
    before = {path.name for path in base.iterdir()}
    assert len(before) == 2
    path = data[0] / data[1].splits[0].files[0]
    table = pq.read_table(path)
    hashes = pa.array(np.arange(table.num_rows) + 7_000)
    pq.write_table(table.set_column(1, "user_hash", hashes), path, row_group_size=FILES[0][0])
    assert rows_of(data, base)[0]["user_hash"].to_pylist() == list(range(7_000, 7_000 + FILES[0][0]))
    assert len([*base.iterdir()]) == 1 and not before & {path.name for path in base.iterdir()}


def test_it_is_bounded(data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = rows_of(data, None)
    base = tmp_path / "cache"
    rows_of(data, base)
    size = max(path.stat().st_size for path in files_in(base))
    for path in files_in(base):
        path.unlink()
    assert rows_of(data, base, max_bytes=3 * size) == first
    assert 0 < sum(path.stat().st_size for path in files_in(base)) <= 3 * size
    assert caplog.text.count("is full") == 1


def test_a_place_that_cannot_be_written_costs_one_line(data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    assert rows_of(data, tmp_path / "file" / "cache") == rows_of(data, None)
    assert caplog.text.count("cannot be written") == 1 and "DataConfig.cache_dir" in caplog.text


def test_a_file_server_that_fails_costs_one_line(data, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    expected, exists = rows_of(data, None), pathlib.Path.exists

    def stale(path, **options):
        if path.suffix == ".arrow":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return exists(path, **options)

    monkeypatch.setattr(pathlib.Path, "exists", stale)
    assert rows_of(data, tmp_path / "cache") == expected
    assert caplog.text.count("cannot be written") == 1


def test_a_full_disk_costs_one_line(data, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "rename", full)
    assert rows_of(data, tmp_path / "cache") == rows_of(data, None)
    assert not files_in(tmp_path / "cache")
    assert caplog.text.count("No space left on device") == 1
    monkeypatch.undo()
    disk = os.statvfs(tmp_path)
    usage = type("Usage", (), {"total": disk.f_blocks * disk.f_frsize, "free": 0})
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: usage)
    assert rows_of(data, tmp_path / "cache") == rows_of(data, None) and not files_in(tmp_path / "cache")


def test_several_readers_share_it(data, tmp_path):
    expected, found = rows_of(data, None), []
    threads = [threading.Thread(target=lambda: found.append(rows_of(data, tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert len(files_in(tmp_path / "cache")) == NUM_GROUPS


def test_only_what_fits_is_narrowed():
    wide = pa.list_(pa.int64())
    columns = {
        "fits": pa.array([[1, 2**31 - 1], []], wide),
        "large": pa.array([[2**31], []], wide),
        "negative": pa.array([[-1], []], wide),
        "null": pa.array([[None, 5], None], wide),
        "empty": pa.array([[], []], wide),
        "scalar": pa.array([1, 2], pa.int64()),
    }
    table = pa.table(columns)
    found = narrowed(table)
    assert {name for name in columns if found[name].type != table[name].type} == {"fits", "null"}
    assert found.to_pydict() == table.to_pydict()


def test_one_folder_may_serve_several_data_sets(tmp_path):
    assert base_folder(tmp_path / "a", "") == tmp_path / "a" / ".decoded"
    one, two = (base_folder(tmp_path / name, str(tmp_path / "cache")) for name in "ab")
    assert one != two and one.parent == two.parent == tmp_path / "cache"
