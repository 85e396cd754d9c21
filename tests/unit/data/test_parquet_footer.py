import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist.data import parquet_footer


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "none"}, {"write_page_index": True, "store_schema": False}, {"use_dictionary": False}],
)
def test_chunks_are_those_of_arrow(tmp_path, options):
    """With many columns and groups: a list of 15 or more has its length in bytes of its own."""
    lists = [[], [1.5], None, [2.0, 2.5, 3.0]] * 25
    columns = {f"list_{n}": pa.array(lists) for n in range(9)} | {"text": pa.array(["a", "bc"] * 50)}
    table = pa.table(columns | {f"number_{n}": pa.array(range(100), pa.int64()) for n in range(9)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=6, **options)
    metadata = pq.read_metadata(tmp_path / "t.parquet")
    assert (metadata.num_row_groups, metadata.num_columns) == (17, 19)
    groups = [metadata.row_group(number) for number in range(17)]
    expected = [[group.column(n) for n in range(19)] for group in groups]
    found = parquet_footer.chunks(parquet_footer.read_bytes(tmp_path / "t.parquet"))
    assert found == [tuple((column.num_values, column.total_compressed_size) for column in row) for row in expected]


@pytest.mark.parametrize(
    ("footer", "problem"),
    [
        (b"", "is damaged"),
        (b"\x00", "is damaged"),  # a struct without row groups
        (b"\x49\xfc" + 10 * b"\xff", "more than 64 bits"),
        (b"\x49\xfc\x64\x00", "list of 100 values"),
        (b"\x4b\x00", "type 11"),
        (b"\x1c" * 10_000, "is damaged"),  # a struct in a struct in a struct ...
        (b"\x49\x1c\x19\x1c\x3c\x58\x01\x41\x26\x02\x00\x00\x00\x00", "a size is no number"),
    ],
)
def test_damage_is_an_error(footer, problem):
    with pytest.raises(OSError, match=problem):
        parquet_footer.chunks(footer)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1\xff\x00\x00\x00PAR1"])
def test_a_file_without_a_footer_is_an_error(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(OSError, match=r"the footer should have \d+ bytes, but the file has \d+"):
        parquet_footer.read_bytes(tmp_path / "t.parquet")
