import pytest
import torch

from gpsd_dist.config import OptimizerConfig, RunConfig, TablesConfig
from gpsd_dist.tables.int8_rows import decode, encode


@pytest.mark.parametrize("width", [1, 3, 16, 50, 64, 128, 256])
def test_values_come_back_within_half_a_step_of_their_row(width):
    rows = torch.randn(200, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 200)[:, None]
    columns = TablesConfig(embedding_dim=width, frozen_dtype="int8").frozen_columns
    coded = encode(rows, columns)
    assert coded.shape == (200, columns) and coded.dtype == torch.float32
    step = (rows.amax(1) - rows.amin(1)) / 255
    assert ((decode(coded, width) - rows).abs() <= 0.501 * step[:, None] + 1e-6 * rows.abs()).all()


def test_codes_are_exact_integers_and_coding_again_changes_nothing():
    rows = torch.randint(0, 256, (50, 64), generator=torch.Generator().manual_seed(0)).float()
    rows[:, 0], rows[:, 1] = 0, 255  # scale 1, offset 0: codes are the values, the largest packed one 2^24 - 1
    rows[0, :3] = 255
    assert torch.equal(decode(encode(rows, 24), 64)[1:], rows[1:])
    noise = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    once = decode(encode(noise, 24), 64)
    torch.testing.assert_close(decode(encode(once, 24), 64), once, rtol=0, atol=1e-6)


def test_equal_values_and_empty_tables():
    rows = torch.full((4, 16), 0.25)
    assert torch.equal(decode(encode(rows, 8), 16), rows)
    assert decode(encode(rows[:0], 8), 16).shape == (0, 16)


def test_stored_sizes():
    sizes = {}
    for dtype in ("fp32", "fp16", "int8"):
        tables = TablesConfig(embedding_dim=64, frozen_dtype=dtype)
        sizes[dtype] = tables.frozen_columns * tables.frozen_value_bytes
    assert sizes == {"fp32": 256, "fp16": 128, "int8": 96}
    for tables in (TablesConfig(embedding_dim=width) for width in (5, 8)):
        assert tables.frozen_columns == tables.stored_dim


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="frozen_dtype 'int4' is not one of"):
        TablesConfig(frozen_dtype="int4")
    with pytest.raises(ValueError, match=r"tables \['item'\] row_wise or table_wise"):
        TablesConfig(frozen_dtype="int8", sharding={"item": "column_wise"})
    with pytest.raises(ValueError, match="nothing is frozen"):
        RunConfig("finetune", "d", "o", tables=TablesConfig(frozen_dtype="fp16"), dense=OptimizerConfig("adamw", 1e-3))
