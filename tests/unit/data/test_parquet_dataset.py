import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist.data import parquet_dataset, parquet_footer
from gpsd_dist.data.parquet_dataset import ParquetSplit
from tests.unit.data.parquet_files import FILES, NUM_ROWS, make_table, write_split


def first_file(data_dir, manifest):
    return data_dir / manifest.splits[0].files[0]


def rewrite(path, change, **options):
    pq.write_table(change(pq.read_table(path)), path, **options)


def test_row_groups_hold_all_rows_in_file_order(tmp_path):
    split = ParquetSplit(tmp_path, write_split(tmp_path), "pretrain")
    assert split.group_rows_G.tolist() == [rows for groups in FILES for rows in groups]
    rows = pa.concat_tables([split.read_group(group) for group in range(len(split.groups))])
    assert rows["user_hash"].to_pylist() == list(range(NUM_ROWS))
    assert rows.schema == split.full_schema
    path, row = split.origin(4, 2)  # first group of the third file
    assert (path.name, row) == ("part-00002.parquet", 2)
    assert split.origin(5, 1)[1] == FILES[2][0] + 1


def test_only_the_wanted_columns_are_read(tmp_path):
    split = ParquetSplit(tmp_path, write_split(tmp_path), "pretrain", ["history.item", "user_hash"])
    assert split.read_group(0).column_names == ["history.item", "user_hash"]
    assert split.read_history_length(0).dtype == np.int32


def test_cache_and_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_dataset, "MAX_OPEN_FILES", 2)
    manifest = write_split(tmp_path)
    size = ParquetSplit(tmp_path, manifest, "pretrain").read_group(2).nbytes
    split = ParquetSplit(tmp_path, manifest, "pretrain", cache_bytes=size)
    for group in [0, 3, 4, 2, 7, 0]:
        split.read_group(group)
        assert split._cached_bytes == sum(table.nbytes for table in split._cache.values()) <= size
        assert len(split._open) <= 2
    assert split.read_group(0) is split.read_group(0)
    split.close()
    assert split.read_group(0).num_rows == FILES[0][0]


def test_names_and_nullability_of_list_elements_may_differ(tmp_path):
    manifest = write_split(tmp_path)
    field = pa.field("history.item", pa.list_(pa.field("element", pa.int64(), nullable=False)))

    def change(table):
        return table.set_column(3, field, table["history.item"].cast(field.type))

    rewrite(first_file(tmp_path, manifest), change)
    split = ParquetSplit(tmp_path, manifest, "pretrain")
    assert split.read_group(0).schema == split.full_schema


def test_unknown_column_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no columns \['history.brand'\]; it has \['user_id'"):
        ParquetSplit(tmp_path, write_split(tmp_path), "pretrain", ["history.brand"])


def test_missing_column_and_wrong_type_are_named(tmp_path):
    manifest = write_split(tmp_path)
    rewrite(first_file(tmp_path, manifest), lambda table: table.drop_columns(["history.item"]))
    other = tmp_path / manifest.splits[0].files[1]
    rewrite(other, lambda table: table.set_column(1, "user_hash", table["user_hash"].cast(pa.float64())))
    with pytest.raises(ValueError) as error:
        ParquetSplit(tmp_path, manifest, "pretrain")
    assert "part-00000.parquet: column 'history.item' is missing" in str(error.value)
    assert "part-00001.parquet: column 'user_hash' has type double, expected int64" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "part-00000.parquet does not exist, but manifest.json lists it"),
        (lambda path: path.write_bytes(b""), r"part-00000.parquet is empty \(0 bytes\)"),
        (lambda path: path.write_text("user,item\n1,2\n"), "part-00000.parquet is truncated or not a Parquet file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "part-00000.parquet is truncated or not a Parquet"),
        (lambda path: rewrite(path, lambda table: table.slice(0, 0)), "part-00000.parquet is empty: it has columns"),
        (lambda path: rewrite(path, lambda table: table.slice(1)), f"have {NUM_ROWS - 1} rows, manifest.json says"),
    ],
)
def test_bad_file_is_an_error_when_the_split_is_opened(tmp_path, damage, message):
    manifest = write_split(tmp_path)
    damage(first_file(tmp_path, manifest))
    with pytest.raises(ValueError, match=message):
        ParquetSplit(tmp_path, manifest, "pretrain")


def test_damaged_data_behind_an_intact_footer_names_file_and_row_group(tmp_path):
    manifest = write_split(tmp_path, compression="zstd")
    path = first_file(tmp_path, manifest)
    data = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    data[offset : offset + 60] = b"\xff" * 60
    path.write_bytes(data)
    split = ParquetSplit(tmp_path, manifest, "pretrain")
    assert split.read_group(0).num_rows == FILES[0][0]
    with pytest.raises(ValueError, match=r"part-00000.parquet: row group 2 cannot be decoded"):
        split.read_group(2)


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path):
    """By one with as many rows in as many row groups: a data set that was built anew in place."""
    lengths = np.full(sum(sum(groups) for groups in FILES), 5)
    manifest = write_split(tmp_path / "a", lengths=lengths)
    split = ParquetSplit(tmp_path / "a", manifest, "pretrain", cache_bytes=0)
    before = split.read_group(0)
    split.close()  # as after a validation
    assert split.read_group(0) == before
    write_split(tmp_path / "b", lengths=lengths[::-1] * 2)
    first_file(tmp_path / "b", manifest).replace(first_file(tmp_path / "a", manifest))
    split.close()
    with pytest.raises(ValueError, match=r"row group 0 cannot be decoded \(its footer is not that of the start"):
        split.read_group(0)


def test_null_history_length_is_an_error(tmp_path):
    manifest = write_split(tmp_path, files=((3,),))
    table = make_table(manifest, np.array([1, 2, 3]))
    nulls = pa.array([1, None, 3], pa.int32())
    pq.write_table(table.set_column(2, "history_length", nulls), first_file(tmp_path, manifest))
    with pytest.raises(ValueError, match="column 'history_length' has 1 nulls in row group 0"):
        ParquetSplit(tmp_path, manifest, "pretrain").read_history_length(0)


def _read_all(data_dir, manifest) -> pa.Table:
    split = ParquetSplit(data_dir, manifest, "pretrain")
    try:
        for group in range(len(split.groups)):
            split.read_history_length(group)
        return pa.concat_tables([split.read_group(group) for group in range(len(split.groups))])
    finally:
        split.close()


@pytest.mark.parametrize(
    ("compression", "stride"), [("zstd", 17), *(pytest.param(c, 1, marks=pytest.mark.slow) for c in ("zstd", "none"))]
)
def test_a_flipped_bit_anywhere_in_a_file_is_an_error_or_changes_nothing(tmp_path, compression, stride):
    """One bit of every `stride`th byte: pages, their headers (which no checksum covers), and the footer."""
    manifest = write_split(tmp_path, ((7, 5),), compression=compression)
    path, whole = first_file(tmp_path, manifest), _read_all(tmp_path, manifest)
    content, bit = bytearray(path.read_bytes()), np.random.default_rng(0).integers(0, 8, path.stat().st_size)
    positions, num_refused = range(0, len(content), stride), 0
    for position in positions:
        content[position] ^= 1 << bit[position]
        path.write_bytes(content)
        content[position] ^= 1 << bit[position]
        try:
            assert _read_all(tmp_path, manifest).equals(whole), f"byte {position}, bit {bit[position]}"
        except ValueError as error:
            num_refused += 1
            assert str(path) in str(error)
    assert num_refused > len(positions) / 4  # names of the writer, statistics and the like may say anything


def test_a_footer_that_would_end_the_process_is_an_error(tmp_path):
    """A wrong size of a histogram: Arrow's `RowGroupMetaData.column` aborts, and `read_row_group` raises."""
    manifest = write_split(tmp_path, ((7, 5),))
    path = first_file(tmp_path, manifest)
    content, footer = path.read_bytes(), parquet_footer.read_bytes(path)
    for bit in range(8 * content.index(footer), 8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            pq.ParquetFile(pa.BufferReader(damaged)).read_row_group(0)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if "histogram size mismatch" in str(error):
                break
    else:
        pytest.fail("Arrow writes no histograms any more: parquet_footer may go")
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"row group 0 cannot be decoded .*histogram size mismatch"):
        _read_all(tmp_path, manifest)


def test_a_page_header_that_cuts_a_list_off_is_an_error(tmp_path):
    """Arrow reads such a file without a word: a bit of the number of values of a page."""
    manifest = write_split(tmp_path, ((7,),), lengths=np.full(7, 3))
    path, whole = first_file(tmp_path, manifest), _read_all(tmp_path, manifest)
    meta, content = pq.ParquetFile(path).metadata.row_group(0), path.read_bytes()
    [index] = [i for i in range(meta.num_columns) if meta.column(i).path_in_schema.startswith("history.item")]
    start, silent = meta.column(index).data_page_offset, []
    for position in range(8 * start, 8 * (start + 40)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        try:
            rows = pq.ParquetFile(pa.BufferReader(damaged), page_checksum_verification=True).read_row_group(0)
        except (pa.ArrowException, OSError):
            continue
        if rows["history.item"] != whole["history.item"]:
            silent.append(damaged)
    assert silent, "Arrow finds these by itself now: _check_num_values may go"
    for damaged in silent:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"row group 0 .*'history.item' has \d+ values, the footer says 21"):
            _read_all(tmp_path, manifest)
