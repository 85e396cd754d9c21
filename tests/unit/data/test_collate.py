import dataclasses
import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch

from gpsd_dist import schema
from gpsd_dist.batch.batch import Bag
from gpsd_dist.batch.lookup import bags_per_table
from gpsd_dist.config import NEGATIVES_PER, ModelConfig, TablesConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.negatives import Mixed
from gpsd_dist.data.parquet_dataset import BadValue, BatchKey
from gpsd_dist.model.gpsd import NextItemModel, RankingModel
from gpsd_dist.tables.collections import Tables
from tests.helpers.synthetic import FEATURES, TABLE_ROWS, make_manifest, make_rows, write_split

KEY = BatchKey(epoch=0, step=0, rank=0)
MANIFEST = make_manifest(max_history_length=6)
LOOKUP = ("item", "tag")
TOKEN_FEATURES = ("item", "category", "tags", "price", "behaviour")

# Three requests by hand, lengths 2, 0, 4; the model sees 3 tokens at most.
COLUMNS = {
    "user_id": ["a", "b", "c"],
    "user_hash": [11, 22, 33],
    "history_length": [2, 0, 4],
    "history.item": [[7, 5], [], [9, 7, 1, 3]],
    "history.category": [[2, 3], [], [4, 2, 1, 5]],
    "history.tags": [[[8], []], [], [[30], [8, 9], [31, 8, 2], []]],
    "history.price": [[0.5, 1.5], [], [9.0, 2.5, 3.5, 4.5]],
    "history.behaviour": [[2, 3], [], [5, 4, 3, 2]],
    "history.time_s": [[100, None], [], [200, 210, 220, None]],
    "request_time_s": [1000, 2000, 3000],
    "candidate.item": [[5], [8, 1], [7, 8, 20]],
    "candidate.category": [[3], [6, 1], [2, 6, 7]],
    "candidate.tags": [[[2]], [[], [9, 10]], [[8], [], [11]]],
    "candidate.price": [[0.1], [0.2, 0.3], [0.4, 0.5, 0.6]],
    "candidate.tab": [[2], [3, 4], [1, 2, 3]],
    "candidate.discount": [[1.0], [2.0, 3.0], [4.0, -0.5, 0.5]],
    "label.click": [[1.0], [None, 0.0], [1.0, 0.0, None]],
    "label.buy": [[0.0], [None, None], [1.0, None, None]],
    "context.segment": [2, 3, 4],
    "context.interests": [[2, 40 - 1], [], [9]],
    "context.age": [0.25, 0.5, 0.75],
}


def make_table(**changed):
    return pa.table(COLUMNS | changed, schema=schema.arrow_schema(MANIFEST, "train"))


def make_collate(**options):
    defaults = {"lookup_tables": LOOKUP, "max_history_length": 3, "with_candidates": True}
    return Collate(MANIFEST, **(defaults | options))


def collate_one(table=None, key=KEY, **options):
    [batch] = make_collate(**options)(make_table() if table is None else table, key)
    return batch


def indices_of(batch, table):
    """Distinct indices that the batch looks up in a table."""
    return batch.lookup[table].values()


def bags(bag, rows=None):
    values = bag.rows if rows is None else rows[bag.rows]
    return [values[start:stop].tolist() for start, stop in zip(bag.offsets, bag.offsets[1:])]


def test_batch_of_a_table_by_hand():
    batch = collate_one()
    item, tag = indices_of(batch, "item"), indices_of(batch, "tag")
    assert batch.source_row_B.tolist() == [1, 0, 2]  # by length 0, 2, 3
    assert batch.user_hash_B.tolist() == [22, 11, 33]
    assert batch.request_time_s_B.tolist() == [2000, 1000, 3000]
    assert batch.packing.history_offsets.tolist() == [0, 0, 2, 5]
    assert batch.packing.candidate_offsets.tolist() == [0, 2, 3, 6]

    assert batch.history_item_T.tolist() == [7, 5, 7, 1, 3]  # the oldest of row c is cut
    assert item[batch.history["item"]].tolist() == [7, 5, 7, 1, 3]
    assert batch.history["category"].tolist() == [2, 3, 2, 1, 5]
    assert bags(batch.history["tags"], tag) == [[8], [], [8, 9], [31, 8, 2], []]
    assert batch.history["price"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert batch.history["behaviour"].tolist() == [2, 3, 4, 3, 2]
    assert batch.history_time_s_T.tolist() == [100, -1, 210, 220, -1]

    assert batch.candidate_item_C.tolist() == [8, 1, 5, 7, 8, 20]
    assert item[batch.candidate["item"]].tolist() == [8, 1, 5, 7, 8, 20]
    assert batch.candidate["category"].tolist() == [6, 1, 3, 2, 6, 7]
    assert bags(batch.candidate["tags"], tag) == [[], [9, 10], [2], [8], [], [11]]
    torch.testing.assert_close(batch.candidate["price"], torch.tensor([0.2, 0.3, 0.1, 0.4, 0.5, 0.6]))
    assert batch.candidate["tab"].tolist() == [3, 4, 2, 1, 2, 3]
    assert batch.candidate["discount"].tolist() == [2.0, 3.0, 1.0, 4.0, -0.5, 0.5]
    nan = torch.nan
    expected = {"click": [nan, 0, 1, 1, 0, nan], "buy": [nan, nan, 0, 1, nan, nan]}
    for task, labels in expected.items():
        torch.testing.assert_close(batch.labels[task], torch.tensor(labels), equal_nan=True)

    assert batch.context["segment"].tolist() == [3, 2, 4]
    assert bags(batch.context["interests"], tag) == [[], [2, 39], [9]]
    assert batch.context["age"].tolist() == [0.5, 0.25, 0.75]
    assert batch.next_item is None
    assert item.tolist() == [1, 3, 5, 7, 8, 20]  # each once
    assert tag.tolist() == [2, 8, 9, 10, 11, 31, 39]  # of three columns
    assert batch.lookup.stride() == bags_per_table("cuda" if torch.cuda.is_available() else "cpu", 1)


def test_numbers_are_standardised_and_outliers_cut():
    features = tuple(
        dataclasses.replace(f, mean=2.0, std=0.5) if f.kind == "numerical" else f for f in MANIFEST.features
    )
    collate = dataclasses.replace(make_collate(), manifest=dataclasses.replace(MANIFEST, features=features))
    table = make_table(**{"context.age": [2.25, 1e30, -1e30]})
    [batch] = collate(table, KEY)
    assert batch.context["age"].tolist() == [5.0, 0.5, -5.0]  # rows b, a, c
    assert batch.history["price"].tolist() == [-3.0, -1.0, 1.0, 3.0, 5.0]
    assert batch.candidate["discount"].tolist() == [0.0, 2.0, -2.0, 4.0, -5.0, -3.0]


def test_types_are_those_that_the_model_needs():
    batch = collate_one()
    floats = {"price", "discount", "age"}
    for place in (batch.history, batch.candidate, batch.context):
        for name, column in place.items():
            tensor = column.rows if isinstance(column, Bag) else column
            assert tensor.dtype == (torch.float32 if name in floats else torch.int64), name
    assert all(label.dtype == torch.float32 for label in batch.labels.values())
    for tensor in (batch.history_item_T, batch.candidate_item_C, batch.history_time_s_T, batch.user_hash_B):
        assert tensor.dtype == torch.int64


def test_equal_lengths_keep_their_order():
    table = make_rows(MANIFEST, "train", seed=0, num_rows=40)
    batch = collate_one(table, max_history_length=2)
    length = np.minimum(table["history_length"].to_numpy(), 2)  # all above 2 are equal too
    assert set(length) == {0, 1, 2}
    assert batch.source_row_B.tolist() == sorted(range(40), key=lambda row: length[row])


@pytest.mark.parametrize("lookup", [("item",), ("item", "tag"), tuple(TABLE_ROWS)])
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("split", ["train", "pretrain"])
def test_lookup_rows_reproduce_the_indices_of_every_feature(lookup, num_parts, split):
    table = make_rows(MANIFEST, split, seed=1, num_rows=25)
    batches = make_collate(lookup_tables=lookup, num_parts=num_parts, with_candidates=split == "train")(table, KEY)
    assert len(batches) == num_parts
    for table_name in lookup:
        unique = indices_of(batches[0], table_name).tolist()
        assert unique == sorted(set(unique))
    for batch in batches:
        assert batch.lookup is batches[0].lookup
        for feature in MANIFEST.features:
            for place in feature.places:
                column = getattr(batch, place).get(feature.name)
                if column is None:
                    assert split == "pretrain" and place != "history"
                    continue
                source = [table[f"{place}.{feature.name}"].to_pylist()[row] for row in batch.source_row_B.tolist()]
                if place == "history":
                    source = [entries[-3:] for entries in source]
                expected = source if place == "context" else [entry for entries in source for entry in entries]
                rows = indices_of(batch, feature.table) if feature.table in lookup else None
                if feature.is_bag:
                    assert bags(column, rows) == expected
                else:
                    got = column if rows is None else rows[column]
                    assert got.tolist() == (expected if feature.kind == "categorical" else pytest.approx(expected))


def test_no_row_is_looked_up_that_nobody_uses():
    options = {"num_parts": 2, "negatives_per": "group", "num_negatives": 3, "with_candidates": False}
    batches = make_collate(**options)(make_rows(MANIFEST, "pretrain", seed=1, num_rows=9), KEY)
    used = [batch.history["item"] for batch in batches] + [batch.next_item.target["item"] for batch in batches]
    used = torch.cat(used + [batch.next_item.negative_row_GN.flatten() for batch in batches])
    assert set(used.tolist()) == set(range(len(indices_of(batches[0], "item"))))


def test_deduplication_of_a_huge_table_gives_the_same(monkeypatch):
    table = make_rows(MANIFEST, "train", seed=1, num_rows=25)
    expected = collate_one(table)
    monkeypatch.setattr("gpsd_dist.data.distinct._DENSE_UNIQUE_ROWS", 10)
    batch = collate_one(table)
    assert torch.equal(batch.lookup.values(), expected.lookup.values())
    assert torch.equal(batch.history["item"], expected.history["item"])
    assert torch.equal(batch.candidate["tags"].rows, expected.candidate["tags"].rows)


@pytest.mark.parametrize("num_parts", [1, 2, 4, 40])
def test_parts_cover_every_row_once_and_are_alike(num_parts):
    table = make_rows(MANIFEST, "train", seed=2, num_rows=30)
    batches = make_collate(num_parts=num_parts)(table, KEY)
    rows = [row for batch in batches for row in batch.source_row_B.tolist()]
    assert sorted(rows) == list(range(30))
    sizes = [batch.packing.num_requests for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    tokens = [batch.packing.num_history_tokens for batch in batches]
    assert max(tokens) - min(tokens) <= 3  # dealt round by length: the parts differ by one truncated history at most


# --- next item -----------------------------------------------------------------------------------------------------


def collate_next(table=None, key=KEY, **options):
    options = {
        "negatives_per": "group",
        "num_negative_groups": 2,
        "num_negatives": 5,
        "with_candidates": False,
    } | options
    return collate_one(table, key, **options)


def whole_histories(rows):
    """The batch as the tower would see it without next items to predict."""
    return collate_one(rows, with_candidates=False, max_history_length=6)


def test_next_item_pairs_by_hand():
    batch = collate_next()
    next_item = batch.next_item  # histories: none | 7 5 | 7 1 3
    # Without their last tokens: none | 7 | 7 1. 7 -> 5 and 1 -> 3; 7 -> 1 is unknown and no target.
    assert batch.history_item_T.tolist() == [7, 7, 1] and batch.packing.history_length_B.tolist() == [0, 1, 2]
    assert batch.num_read_tokens == 5
    assert next_item.token_M.tolist() == [0, 2]
    assert next_item.item_M.tolist() == [5, 3]
    item = indices_of(batch, "item")
    assert item[next_item.target["item"]].tolist() == [5, 3]
    assert item[batch.history["item"]].tolist() == [7, 7, 1]
    assert torch.equal(item[next_item.negative_row_GN], next_item.negative_item_GN)
    assert batch.candidate == {} and batch.context == {} and batch.labels == {}


def test_targets_are_the_next_known_items_of_the_same_request():
    rows = make_rows(MANIFEST, "pretrain", seed=5, num_rows=30)
    batch, whole = collate_next(rows, max_history_length=6), whole_histories(rows)
    next_item, lengths = batch.next_item, whole.packing.history_offsets.diff()
    assert batch.packing.history_length_B.tolist() == (lengths - 1).clamp(min=0).tolist()
    histories = whole.history_item_T.split(lengths.tolist())
    inputs = torch.cat([history[:-1] for history in histories])
    targets = torch.cat([history[1:] for history in histories])
    assert torch.equal(batch.history_item_T, inputs)
    assert torch.equal(next_item.token_M, (targets >= 2).nonzero().flatten())
    assert torch.equal(next_item.item_M, targets[targets >= 2])
    for name, target_M in next_item.target.items():
        assert target_M.shape == next_item.item_M.shape, name
    category = torch.cat([part[1:] for part in whole.history["category"].split(lengths.tolist())])
    assert torch.equal(next_item.target["category"], category[targets >= 2])


def test_bags_and_times_lose_the_last_token_and_the_request_takes_its_time():
    rows = make_rows(MANIFEST, "pretrain", seed=5, num_rows=30)
    batch, whole = collate_next(rows, max_history_length=6), whole_histories(rows)
    lengths = whole.packing.history_offsets.diff().tolist()
    times = whole.history_time_s_T.split(lengths)
    assert torch.equal(batch.history_time_s_T, torch.cat([part[:-1] for part in times]))
    assert batch.request_time_s_B.tolist() == [int(part[-1]) if len(part) else -1 for part in times]
    bags, kept = whole.history["tags"], batch.history["tags"]
    ends = torch.stack((bags.offsets[:-1], bags.offsets[1:]), 1).split(lengths)
    wanted = torch.cat([part[:-1] for part in ends])
    index = [indices_of(source, "tag")[bag.rows] for source, bag in ((whole, bags), (batch, kept))]
    assert torch.equal(index[1], torch.cat([index[0][a:b] for a, b in wanted.tolist()]))
    assert torch.equal(kept.offsets.diff(), wanted.diff(dim=1).flatten())


@pytest.mark.parametrize("groups", [1, 3, 100])
def test_groups_share_positions_evenly(groups):
    table = make_rows(MANIFEST, "pretrain", seed=5, num_rows=30)
    next_item = collate_next(table, num_negative_groups=groups).next_item
    sizes = np.diff(next_item.group_offsets)
    assert next_item.group_offsets[0] == 0 and next_item.group_offsets[-1] == len(next_item.token_M)
    assert len(sizes) == groups and sizes.max() - sizes.min() <= 1
    assert next_item.negative_item_GN.shape == next_item.negative_row_GN.shape == (groups, 5)


def test_one_group_per_request():
    table = make_rows(MANIFEST, "pretrain", seed=5, num_rows=30)
    batch = collate_next(table, negatives_per="request")
    owner = torch.repeat_interleave(torch.arange(30), batch.packing.history_offsets.diff())
    group = np.repeat(np.arange(30), np.diff(batch.next_item.group_offsets))
    assert group.tolist() == owner[batch.next_item.token_M].tolist()
    assert batch.next_item.negative_item_GN.shape == (30, 5)


def test_a_set_per_position():
    table = make_rows(MANIFEST, "pretrain", seed=5, num_rows=30)
    batch = collate_next(table, negatives_per="position")
    next_item = batch.next_item
    assert next_item.group_offsets is None
    assert next_item.negative_item_GN.shape == next_item.negative_row_GN.shape == (len(next_item.token_M), 5)
    assert len(next_item.negative_item_GN.unique(dim=0)) > 0.99 * len(next_item.token_M)  # drawn independently
    assert torch.equal(indices_of(batch, "item")[next_item.negative_row_GN], next_item.negative_item_GN)
    again = collate_next(table, negatives_per="position").next_item
    assert torch.equal(again.negative_item_GN, next_item.negative_item_GN)
    other = collate_next(table, dataclasses.replace(KEY, step=KEY.step + 1), negatives_per="position").next_item
    assert not torch.equal(other.negative_item_GN, next_item.negative_item_GN)


def draws(key, seed=0, **options):
    return collate_next(key=key, seed=seed, num_negatives=50, **options).next_item.negative_item_GN


def test_negatives_are_a_function_of_seed_epoch_step_and_rank():
    first = draws(BatchKey(1, 2, 3), seed=4)
    assert torch.equal(first, draws(BatchKey(1, 2, 3), seed=4))
    table = make_rows(MANIFEST, "pretrain", seed=9, num_rows=3)  # other rows, same draw
    assert torch.equal(first, draws(BatchKey(1, 2, 3), seed=4, table=table))
    others = [(BatchKey(0, 2, 3), 4), (BatchKey(1, 1, 3), 4), (BatchKey(1, 2, 0), 4), (BatchKey(1, 2, 3), 0)]
    others += [(BatchKey(2, 1, 3), 4), (BatchKey(3, 2, 1), 4), (BatchKey(1, 2, 4), 3)]  # swapped parts of the key
    for key, seed in others:
        assert not torch.equal(first, draws(key, seed=seed)), (key, seed)
    assert not torch.equal(first[0], first[1])  # groups differ


def test_negatives_are_uniform_over_the_known_items():
    items = collate_next(num_negatives=20_000).next_item.negative_item_GN.flatten()
    num_rows = MANIFEST.table("item").num_rows
    counts = torch.bincount(items, minlength=num_rows)
    assert len(counts) == num_rows and counts[:2].tolist() == [0, 0]
    # 40,000 draws over 198 items: mean 202, sigma 14.2; 5 sigma
    assert (counts[2:] - 40_000 / 198).abs().max() < 72


def test_mixed_negatives_have_the_probabilities_that_they_say():
    event_V = np.array([90, 90, 0, 7, 1, 0, 2])
    mixed = Mixed(0.5, event_V)
    drawn = mixed(np.random.default_rng(0), 4, 50_000, len(event_V))
    share = np.bincount(drawn.flatten(), minlength=7) / drawn.size
    expected = np.where(np.arange(7) < 2, 0, 0.5 / 5 + 0.5 * np.where(np.arange(7) < 2, 0, event_V) / 10)
    np.testing.assert_allclose(share, expected, atol=5e-3)  # standard error 1.1e-3
    np.testing.assert_allclose(np.exp(mixed.log_q(np.array([[2, 3]]))), [expected[2:4] * 2], rtol=1e-5)
    with pytest.raises(ValueError, match="split 'pretrain', which has none"):
        Mixed(0.1, np.array([3, 4, 0, 0]))


def test_a_batch_says_how_likely_its_negatives_were_and_when_its_targets_happened():
    plain = collate_next().next_item
    assert plain.negative_log_q_GN is None and plain.time_s_M is None
    mixed = Mixed(0.5, np.arange(MANIFEST.table("item").num_rows))
    batch = collate_next(sampler=mixed, with_target_times=True)
    drawn = batch.next_item
    np.testing.assert_array_equal(drawn.negative_log_q_GN, mixed.log_q(drawn.negative_item_GN.numpy()))
    assert drawn.time_s_M.shape == drawn.item_M.shape and torch.equal(drawn.item_M, plain.item_M)
    rows = make_table().to_pylist()
    times = {
        (item, -1 if t is None else t) for row in rows for item, t in zip(row["history.item"], row["history.time_s"])
    }
    assert set(zip(drawn.item_M.tolist(), drawn.time_s_M.tolist())) <= times


def test_parts_draw_their_own_negatives():
    options = {"num_parts": 2, "negatives_per": "group", "num_negatives": 20, "with_candidates": False}
    first, second = make_collate(**options)(make_table(), KEY)
    assert not torch.equal(first.next_item.negative_item_GN, second.next_item.negative_item_GN)


# --- empty batches -------------------------------------------------------------------------------------------------


def models(with_candidates):
    tables, model = TablesConfig(embedding_dim=8, small_table_max_rows=30), ModelConfig(layers=1, width=16, heads=2)
    sharded = tuple(table for table in MANIFEST.tables if table.name in LOOKUP)
    torch.manual_seed(0)
    if with_candidates:
        dense = RankingModel(MANIFEST, tables, model, sharded, ("click", "buy"))
    else:
        dense = NextItemModel(MANIFEST, tables, model, sharded, ("category",))
    return Tables(sharded, (), tables, torch.device("cpu")), dense


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("negatives_per", NEGATIVES_PER)
def test_no_rows_give_an_empty_batch_that_the_pretraining_model_takes(chunked, negatives_per):
    empty = make_table().slice(0, 0)
    empty = empty.select(make_collate(with_candidates=False).columns())
    if chunked:
        empty = pa.table(
            {name: pa.chunked_array([], field.type) for name, field in zip(empty.column_names, empty.schema)}
        )
    batch = collate_next(empty, negatives_per=negatives_per).to(torch.device("cpu"))
    assert batch.packing.num_requests == 0 and len(batch.next_item.token_M) == 0
    tables, model = models(with_candidates=False)
    outputs = model(tables(batch.lookup), batch)
    assert outputs.hidden_TE.shape == (0, 8)
    outputs.hidden_TE.sum().backward()


@pytest.mark.parametrize("num_parts", [1, 2])
def test_no_rows_give_an_empty_batch_that_the_ranking_model_takes(num_parts):
    tables, model = models(with_candidates=True)
    for batch in make_collate(num_parts=num_parts)(make_table().slice(0, 0), KEY):
        logits = model(tables(batch.lookup), batch.to(torch.device("cpu")))
        assert {task: logit.shape for task, logit in logits.items()} == {"click": (0,), "buy": (0,)}
        sum(logit.sum() for logit in logits.values()).backward()


def test_only_empty_histories_pass_through_both_models():
    table = make_table().take([1, 1])
    tables, model = models(with_candidates=True)
    batch = collate_one(table)
    assert model(tables(batch.lookup), batch)["click"].shape == (4,)
    tables, model = models(with_candidates=False)
    batch = collate_next(table)
    assert model(tables(batch.lookup), batch).hidden_TE.shape == (0, 8)


def test_slices_and_chunks_of_a_table_give_the_same_batch():
    table = make_rows(MANIFEST, "train", seed=3, num_rows=20)
    pieces = pa.concat_tables([table.slice(5, 4), table.slice(9, 6)])
    expected, batch = collate_one(table.take(list(range(5, 15)))), collate_one(pieces)
    assert torch.equal(batch.history_item_T, expected.history_item_T)
    assert bags(batch.history["tags"]) == bags(expected.history["tags"])
    assert torch.equal(batch.lookup.values(), expected.lookup.values())


def test_reading_makes_no_noise():
    was_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns only once per process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert collate_one().packing.num_requests and collate_next().packing.num_requests
    finally:
        torch.set_warn_always(was_always)


def test_columns_are_what_is_read():
    for with_candidates in (True, False):
        collate = make_collate(with_candidates=with_candidates)
        collate(make_table().select(collate.columns()), KEY)
        for name in collate.columns():
            with pytest.raises(KeyError):
                collate(make_table().drop_columns([name]), KEY)


# --- bad values ----------------------------------------------------------------------------------------------------

NAN = float("nan")
BAD = {  # name: (column, row, its value, word of the message)
    "label 2": ("label.click", 2, [1.0, 2.0, 0.0], "0, 1 or null"),
    "label 0.5": ("label.buy", 0, [0.5], "0, 1 or null"),
    "label NaN": ("label.click", 2, [1.0, NAN, None], "0, 1 or null"),
    "labels misaligned": ("label.click", 1, [1.0], "candidates"),
    "labels null": ("label.click", 1, None, "candidates"),
    "padding id": ("history.item", 2, [9, 0, 1, 3], "outside 1 .. 199"),
    "padding id before the cut": ("history.item", 2, [0, 7, 1, 3], "outside 1 .. 199"),
    "negative id": ("history.item", 0, [7, -1], "outside 1 .. 199"),
    "id past the table": ("candidate.item", 2, [7, 200, 20], "outside 1 .. 199"),
    "id past a small table": ("candidate.tab", 1, [3, 5], "outside 1 .. 4"),
    "null id": ("candidate.item", 1, [8, None], "outside 1 .. 199"),
    "bag padding": ("history.tags", 2, [[30], [8, 0], [31], []], "outside 1 .. 39"),
    "bag past the table": ("candidate.tags", 1, [[], [40]], "outside 1 .. 39"),
    "bag null": ("candidate.tags", 2, [[8], [], [None]], "outside 1 .. 39"),
    "context id": ("context.segment", 1, 9, "outside 1 .. 8"),
    "context null": ("context.segment", 2, None, "outside 1 .. 8"),
    "context bag": ("context.interests", 2, [2, 40], "outside 1 .. 39"),
    "number NaN": ("history.price", 2, [1.0, 2.0, NAN, 3.0], "finite"),
    "number infinite": ("candidate.discount", 0, [float("inf")], "finite"),
    "number null": ("candidate.price", 1, [None, 0.5], "finite"),
    "context number NaN": ("context.age", 1, NAN, "finite"),
    "context number null": ("context.age", 0, None, "finite"),
    "history misaligned": ("history.category", 2, [4, 2, 1], "3 entries, expected 4"),
    "item misaligned": ("history.item", 0, [7, 5, 5], "3 entries, expected 2"),
    "history bag misaligned": ("history.tags", 0, [[8]], "1 entries, expected 2"),
    "times misaligned": ("history.time_s", 2, [200, 210], "2 entries, expected 4"),
    "times missing": ("history.time_s", 0, None, "0 entries, expected 2"),
    "candidate misaligned": ("candidate.category", 1, [6], "1 entries, expected 2"),
    "candidate bag misaligned": ("candidate.tags", 1, [[2], [3], [4]], "3 entries, expected 2"),
    "history null": ("history.price", 2, None, "0 entries, expected 4"),
    "length null": ("history_length", 1, None, "0 .. 6"),
    "length too long": ("history_length", 2, 7, "0 .. 6"),
    "length negative": ("history_length", 0, -1, "0 .. 6"),
    "user null": ("user_hash", 2, None, "null"),
    "request time null": ("request_time_s", 0, None, "null"),
}


def table_with(column, row, value):
    values = list(COLUMNS[column])
    values[row] = value
    return make_table(**{column: values})


@pytest.mark.parametrize("name", BAD)
def test_bad_value_names_column_and_row(name):
    column, row, value, words = BAD[name]
    with pytest.raises(BadValue) as caught:
        collate_one(table_with(column, row, value))
    assert (caught.value.column, caught.value.row_in_batch) == (column, row)
    assert words in caught.value.problem


@pytest.mark.parametrize("name", BAD)
def test_bad_value_in_one_of_several_parts_names_the_row(name):
    column, row, value, _ = BAD[name]
    with pytest.raises(BadValue) as caught:
        make_collate(num_parts=2)(table_with(column, row, value), KEY)
    assert (caught.value.column, caught.value.row_in_batch) == (column, row)


@pytest.mark.parametrize("name", ["label 2", "null id", "bag padding", "context number NaN", "length too long"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_names_file_and_row_of_a_bad_value(tmp_path, name, shuffle):
    column, row, value, words = BAD[name]
    good = make_rows(MANIFEST, "train", seed=7, num_rows=17)
    table = pa.concat_tables([good, table_with(column, row, value)])
    split = write_split(tmp_path, "train", table, num_files=2, row_group_rows=4)
    manifest = dataclasses.replace(MANIFEST, splits=(split,))
    collate = make_collate()
    options = {"make_batch": collate, "columns": collate.columns(), "global_batch_rows": 6, "num_data_shards": 2}
    loader = Loader(tmp_path, manifest, "train", shuffle=shuffle, **options)
    with pytest.raises(ValueError) as caught:
        list(loader)
    # 20 rows in two files of 10: the table by hand begins at row 7 of the second.
    expected = f"{tmp_path / 'train' / 'part-00001.parquet'}, row {7 + row} (from 0), column {column!r}"
    assert str(caught.value).startswith(expected) and words in str(caught.value)


def test_features_of_the_test_data_cover_every_kind():
    kinds = {(f.places, f.kind, f.is_bag) for f in FEATURES}
    assert len(kinds) == 9 and [f.name for f in FEATURES if "history" in f.places] == list(TOKEN_FEATURES)


def test_a_share_of_known_ids_is_read_as_unknown_in_training_alone():
    rows = pa.concat_tables([make_table()] * 200)
    [plain], [lossy], [again] = (make_collate(unknown_rate=rate)(rows, KEY) for rate in (0.0, 0.2, 0.2))
    for name in ("item", "tags"):
        before, after, same = (_values(batch, "candidate", name) for batch in (plain, lossy, again))
        is_lost = before != after
        assert (after[is_lost] == schema.UNKNOWN_INDEX).all() and torch.equal(after, same)
        share = is_lost.sum() / (before >= schema.NUM_RESERVED_ROWS).sum()
        assert 0.15 < share < 0.25
    assert torch.equal(plain.candidate["price"], lossy.candidate["price"])
    [drawn] = make_collate(unknown_rate=0.2, with_candidates=False, negatives_per="group", num_negatives=4)(rows, KEY)
    assert (drawn.next_item.item_M >= schema.NUM_RESERVED_ROWS).all()  # what is unknown is no target


def _values(batch, place, name):
    column = getattr(batch, place)[name]
    rows = indices_of(batch, MANIFEST.feature(name).table)
    return rows[column.rows if isinstance(column, Bag) else column]
