"""Ids of a batch become rows of the table: everywhere the same, negatives only among rows that belong to an id."""

import dataclasses

import numpy as np
import pytest
import torch

from gpsd_dist.batch.batch import Bag
from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.tables.id_remapping import IdRemapper
from gpsd_dist.tables.managed_collision import ManagedCollisionMap
from tests.helpers.synthetic import make_manifest, make_rows

MANAGED = ("item", "tag")
MANIFEST = dataclasses.replace(make_manifest(), unbounded=dict.fromkeys(MANAGED, "managed"))  # indices serve as ids
CPU = torch.device("cpu")


def make_parts(split: str, per: str | None = "group", num_parts: int = 1, num_negatives: int = 40):
    is_pretraining = split == "pretrain"
    collate = Collate(
        MANIFEST,
        ("item", "category", "tag"),
        max_history_length=20,
        with_candidates=not is_pretraining,
        negatives_per=per if is_pretraining else None,
        num_negative_groups=3,
        num_negatives=num_negatives,
        num_parts=num_parts,
        token_multiple=64,
    )
    rows = make_rows(MANIFEST, split, seed=0, num_rows=30)
    return collate(rows, BatchKey(0, 0, 0))


def make_assignment(known: dict[str, range]) -> IdRemapper:
    """Maps in which these ids have rows."""
    maps = {
        name: ManagedCollisionMap(MANIFEST.table(name).num_rows, IdsConfig(admission_threshold=1), CPU)
        for name in MANAGED
    }
    for name, ids in known.items():
        maps[name].update(torch.tensor(list(ids)), torch.ones(len(ids), dtype=torch.int64))
    return IdRemapper(MANIFEST, maps, {})


def values(column, lookup_T):
    """What a column reads in the lookup, and its bags' offsets."""
    if isinstance(column, Bag):
        return lookup_T[column.rows].tolist(), column.offsets.tolist()
    return lookup_T[column].tolist(), None


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("split", ["pretrain", "train"])
def test_every_column_reads_the_row_of_its_id(split, num_parts):
    raw, assignment = (
        make_parts(split, num_parts=num_parts),
        make_assignment({"item": range(2, 150), "tag": range(2, 20)}),
    )
    assigned = assignment.assign(raw)
    assert len(assigned) == num_parts and all(not part.raw_ids for part in assigned)
    seen = set()
    for before, after in zip(raw, assigned, strict=True):
        assert after.lookup is assigned[0].lookup
        for place in ("history", "candidate", "context"):
            for name in getattr(before, place):
                table = MANIFEST.feature(name).table
                if table not in MANAGED:
                    continue
                ids, ends = values(getattr(before, place)[name], before.lookup[table].values())
                rows, ends_after = values(getattr(after, place)[name], after.lookup[table].values())
                assert rows == assignment._maps[table].rows(torch.tensor(ids, dtype=torch.int64)).tolist()
                assert ends == ends_after
                seen |= {(table, row == 1) for row in rows}
        item_map = assignment._maps["item"]
        assert torch.equal(after.history_item_T, item_map.rows(before.history_item_T))
        assert torch.equal(after.candidate_item_C, item_map.rows(before.candidate_item_C))
    assert seen == {(table, is_unknown) for table in MANAGED for is_unknown in (True, False)}
    assert torch.equal(assigned[0].lookup["category"].values(), raw[0].lookup["category"].values())


def test_counts_are_the_tokens_of_the_whole_batch_and_no_negatives():
    parts = make_parts("pretrain", num_parts=2)
    raw = parts[0].raw_ids["item"]
    ids = parts[0].lookup["item"].values()[: len(raw.count_U)]
    # Of whole histories, though the tower does not see their last tokens.
    whole = make_parts("pretrain", per=None, num_parts=2)
    tokens = torch.cat([part.history_item_T for part in whole])
    assert len(tokens) > sum(len(part.history_item_T) for part in parts)
    expected = tokens.unique(return_counts=True)
    assert torch.equal(ids, expected[0]) and torch.equal(raw.count_U, expected[1])
    assert raw.num_draws == 2 * 3 * 40


@pytest.mark.parametrize("per", ["group", "request", "position"])
def test_only_items_with_a_row_are_targets_and_negatives(per):
    (before,), assignment = make_parts("pretrain", per), make_assignment({"item": range(50, 120)})
    (after,) = assignment.assign((before,))
    old, new = before.next_item, after.next_item
    occupied = assignment._maps["item"].occupied()
    keep = (old.item_M >= 50) & (old.item_M < 120)
    assert 0 < keep.sum() < len(keep)
    assert torch.equal(new.token_M, old.token_M[keep])
    assert all(torch.equal(new.target[name], value_M[keep]) for name, value_M in old.target.items())
    assert torch.equal(new.item_M, assignment._maps["item"].rows(old.item_M[keep]))
    assert torch.isin(new.item_M, occupied).all() and torch.isin(new.negative_item_GN, occupied).all()
    assert torch.equal(after.lookup["item"].values()[new.negative_row_GN], new.negative_item_GN)
    if per == "position":
        assert new.group_offsets is None and len(new.negative_item_GN) == keep.sum()
        assert torch.equal(
            new.negative_item_GN, occupied[before.lookup["item"].values()[old.negative_row_GN[keep]] % 70]
        )
    else:
        groups = [torch.repeat_interleave(torch.tensor(cuts).diff()) for cuts in (old.group_offsets, new.group_offsets)]
        assert torch.equal(groups[0][keep], groups[1]), "a position has another set of negatives"
        assert len(new.negative_item_GN) == len(old.negative_item_GN) == len(new.group_offsets) - 1


def test_negatives_are_uniform_over_the_rows_that_belong_to_an_id():
    (before,), assignment = make_parts("pretrain", num_negatives=20_000), make_assignment({"item": range(50, 120)})
    (after,) = assignment.assign((before,))
    counts = np.unique(after.next_item.negative_item_GN.numpy(), return_counts=True)[1]
    expected = 60_000 / 70
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == 70
    assert abs(chi_square - 69) < 5 * np.sqrt(2 * 69)


def test_without_any_row_nothing_is_predicted():
    (batch,) = make_assignment({}).assign(make_parts("pretrain"))
    assert len(batch.next_item.token_M) == 0 and set(batch.next_item.group_offsets) == {0}


def test_places_of_targets_are_given_up_where_targets_are_dropped():
    (before,) = make_parts("pretrain")
    (after,) = make_assignment({"item": range(50, 120)}).assign((before,))
    assert before.padded.targets is not None and after.padded.targets is None
    assert torch.equal(before.padded.place_S, after.padded.place_S)


def test_without_any_row_everything_is_unknown():
    (batch,) = make_assignment({}).assign(make_parts("pretrain"))
    assert batch.lookup["item"].values().unique().tolist() == [1]


def test_without_managed_tables_a_batch_passes_as_it_is():
    plain = dataclasses.replace(MANIFEST, unbounded={})
    collate = Collate(plain, ("item",), max_history_length=9, with_candidates=True)
    parts = collate(make_rows(plain, "train", seed=0, num_rows=5), BatchKey(0, 0, 0))
    assert IdRemapper(plain, {}, {}).assign(parts) is parts
