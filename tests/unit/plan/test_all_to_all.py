"""Bytes on the wire by hand. Against what ranks really send: tests/integration/test_plan.py."""

import pytest

from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.plan.all_to_all import held_rows, step_traffic
from gpsd_dist.tables.sharding import Cluster, Shard

FOUR = Cluster(world_size=4, local_world_size=2, device_type="cpu")  # one bag per table


def _pieces(kind, sizes, is_frozen=False):
    return tuple(Shard("item", is_frozen, kind, rank, rows, columns) for rank, rows, columns in sizes)


def test_row_wise_by_hand():
    """8 rows over 4 ranks; a rank looks all of them up: 2 rows of 4 columns and a bag from each rank."""
    found = step_traffic(_pieces("row_wise", [(rank, 2, 4) for rank in range(4)]), {"item": 8.0}, 0, FOUR)
    assert found.indices.intra.tolist() == [3 * 8] * 4 and found.indices.inter.tolist() == [2 * 3 * 8] * 4
    assert found.rows.intra.tolist() == [2 * 4 * 4] * 4 and found.rows.inter.tolist() == [2 * 2 * 4 * 4] * 4
    assert found.gradients.total.tolist() == found.rows.total.tolist()
    assert found.total.total.tolist() == [72 + 96 + 96] * 4


def test_table_wise_by_hand():
    """Rank 1 has everything: the others send it indices and gradients, it sends rows to all."""
    found = step_traffic(_pieces("table_wise", [(1, 8, 4)]), {"item": 6.0}, 0, FOUR)
    assert found.indices.intra.tolist() == [7 * 8, 0, 0, 0] and found.indices.inter.tolist() == [0, 0, 56, 56]
    assert found.rows.intra.tolist() == [0, 96, 0, 0] and found.rows.inter.tolist() == [0, 2 * 96, 0, 0]
    assert found.gradients.intra.tolist() == [96, 0, 0, 0] and found.gradients.inter.tolist() == [0, 0, 96, 96]


def test_a_gpu_sends_the_length_of_each_of_its_bags():
    cluster = Cluster(world_size=16, local_world_size=16, device_type="cuda")
    found = step_traffic(_pieces("table_wise", [(1, 8, 4)]), {"item": 6.0}, 0, cluster)
    assert found.indices.total.tolist() == [(6 + 4096) * 8, 0, *[(6 + 4096) * 8] * 14]


def test_column_wise_sends_indices_to_every_piece():
    found = step_traffic(_pieces("column_wise", [(0, 8, 2), (2, 8, 2)]), {"item": 6.0}, 0, FOUR)
    assert found.indices.total.tolist() == [56, 112, 56, 112]
    assert found.rows.total.tolist() == [3 * 6 * 2 * 4, 0, 3 * 6 * 2 * 4, 0]


def test_frozen_tables_send_no_gradient():
    frozen, trained = (
        step_traffic(_pieces("row_wise", [(rank, 2, 4) for rank in range(4)], f), {"item": 8.0}, 0, FOUR)
        for f in (True, False)
    )
    assert not frozen.gradients.total.any() and trained.gradients.total.all()
    assert frozen.rows.total.tolist() == trained.rows.total.tolist()


def test_uneven_pieces_share_the_rows_by_size():
    assert held_rows(_pieces("row_wise", [(0, 31, 4), (1, 30, 4)]), {"item": 61.0}) == [31.0, 30.0]
    assert held_rows(_pieces("row_wise", [(0, 3, 4), (1, 0, 4)]), {"item": 2.0}) == [2.0, 0.0]
    assert held_rows(_pieces("column_wise", [(0, 5, 2), (1, 5, 2)]), {"item": 3.0}) == [3.0, 3.0]


@pytest.mark.parametrize(("world_size", "local", "intra", "inter"), [(4, 2, 600, 600), (2, 2, 400, 0), (1, 1, 0, 0)])
def test_dense_ring_by_hand(world_size, local, intra, inter):
    """100 float32 gradients: 2 (W - 1) / W x 400 bytes per rank; the last rank of a machine sends to the next one."""
    found = step_traffic((), {}, 100, Cluster(world_size, local, "cuda")).dense
    assert found.intra[0] == intra and found.inter[-1] == inter
    assert found.total.tolist() == [2 * (world_size - 1) / world_size * 400] * world_size


@pytest.mark.parametrize(("micro_batches", "passes"), [(1, 3), (4, 9)])
def test_fsdp2_gathers_weights_twice_for_every_part_of_a_batch(micro_batches, passes):
    found = step_traffic((), {}, 100, FOUR, ExecutionConfig(dense_parallel="fsdp2"), micro_batches).dense
    assert found.total.tolist() == [passes * 3 / 4 * 400] * 4
    options = ExecutionConfig(dense_parallel="fsdp2"), micro_batches
    half = step_traffic((), {}, 100, FOUR, *options, is_half=True).dense
    assert half.total.tolist() == [(micro_batches + 1) * 3 / 4 * 400] * 4  # gathered in bf16, scattered in float32
