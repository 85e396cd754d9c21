"""Rows of mapped tables are the rows that were written, whatever the parts and the type."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpsd_dist.serving.artefact import ArtefactError, sum_of
from gpsd_dist.serving.tables import DTYPES, MappedTable, cut_into_parts, encode, read_tensors, write_part

ROWS = torch.randn(1000, 12, generator=torch.Generator().manual_seed(0))
ROWS[5] = 0.25  # a constant row has no scale
# Halves of a step: 2^-11 of the value in fp16, 1/510 of the row's range in int8.
ERROR = {
    "fp32": 0.0,
    "fp16": float(ROWS.abs().max()) * 2**-11,
    "int8": float((ROWS.amax(1) - ROWS.amin(1)).max()) / 510,
}


def written(folder, rows, dtype, shard_rows, rows_per_part):
    paths = []
    for part in cut_into_parts(rows.split(shard_rows), rows_per_part):
        paths.append(folder / f"part{len(paths)}-{shard_rows}")
        write_part(part, dtype, paths[-1])
    return paths


@pytest.mark.parametrize("rows_per_part", [1000, 333, 100, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back(tmp_path, dtype, rows_per_part):
    table = MappedTable("item", written(tmp_path, ROWS, dtype, 400, rows_per_part), dtype, 1000, 12)
    for index in ([0], [5], [999], [0, 99, 100, 332, 333, 334, 999], [], list(range(1000))):
        found = table.rows(np.array(index, np.int64))
        assert found.dtype == torch.float32 and found.shape == (len(index), 12)
        assert float((found - ROWS[index]).abs().max()) <= ERROR[dtype] * 1.001 if index else True
    assert table.rows(np.array([5])).unique().tolist() == [0.25]
    for first, stop in ((0, 1000), (2, 3), (95, 340), (990, 1000)):
        assert torch.equal(table.block(first, stop), table.rows(np.arange(first, stop)))
    for outside in ([-1], [1000], [3, 5000]):
        with pytest.raises(IndexError, match="table 'item', which has 1,000"):
            table.rows(np.array(outside))


def test_the_shards_do_not_show_in_the_parts(tmp_path):
    sums = [[sum_of(path) for path in written(tmp_path, ROWS, "fp32", n, 300)] for n in (1000, 300, 123, 1)]
    assert len(sums[0]) == 4 and all(other == sums[0] for other in sums)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "fp32"), (1e6, "fp16"), (float("inf"), "int8")])
def test_what_is_not_finite_is_refused(value, dtype):
    with pytest.raises(ValueError, match=f"not finite in {dtype}"):
        encode(torch.full((2, 3), value), dtype)


@pytest.mark.parametrize(
    ("tensors", "dtype", "message"),
    [
        ({"rows": torch.zeros(3, 4)}, "fp16", "expected"),
        ({"rows": torch.zeros(3, 5)}, "fp32", "expected"),
        ({"rows": torch.zeros(4, 4)}, "fp32", "have 4 rows, 3 are described"),
        ({"rows": torch.zeros(12)}, "fp32", "expected"),
        ({"codes": torch.zeros(3, 4)}, "fp32", "expected"),
        ({}, "fp32", "expected"),
        ({"codes": torch.zeros(3, 4, dtype=torch.uint8), "scale": torch.zeros(3)}, "int8", "expected"),
        ({"rows": torch.zeros(3, 4)}, "fp64", "none of"),
    ],
)
def test_parts_of_another_kind_are_refused(tmp_path, tensors, dtype, message):
    save_file(tensors, tmp_path / "part")
    with pytest.raises(ArtefactError, match=message):
        MappedTable("item", [tmp_path / "part"], dtype, 3, 4)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\0" * 100, b"\x10\0\0\0\0\0\0\0not JSON at all!", b"PK\x03\x04"]
)
def test_a_file_that_is_no_safetensors_is_a_named_error(tmp_path, content):
    (tmp_path / "part").write_bytes(content)
    with pytest.raises(ArtefactError, match="no safetensors file of ours"):
        read_tensors(tmp_path / "part")
