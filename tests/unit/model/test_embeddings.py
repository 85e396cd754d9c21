import dataclasses

import pytest
import torch
from torch import nn

from gpsd_dist import schema
from gpsd_dist.batch.batch import Bag
from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.model.embeddings import ContextEmbedder, TokenEmbedder, embed
from gpsd_dist.parameter_names import module_key
from gpsd_dist.tables.collections import Tables, lookup_tables
from tests.helpers.reference import fill_
from tests.helpers.synthetic import make_manifest, make_rows

MANIFEST = make_manifest()  # rows: item 200, category 12, tag 40, behaviour 6, tab 5, segment 9
WIDTH, CONTEXT_WIDTH = 8, 6
CPU = torch.device("cpu")


def config(**options):
    return TablesConfig(**({"embedding_dim": WIDTH} | options))


def names(tables):
    return [table.name for table in tables]


@pytest.mark.parametrize(
    ("max_rows", "with_candidates", "expected"),
    [
        (0, True, ["item", "category", "tag", "behaviour", "tab", "segment"]),
        (0, False, ["item", "category", "tag", "behaviour"]),  # pretraining has no candidates and no context
        (9, True, ["item", "category", "tag"]),
        (11, True, ["item", "category", "tag"]),  # 12 rows are more than 11
        (12, True, ["item", "tag"]),  # at most 12 rows are small
        (1000, True, ["item"]),  # the item table always
        (1000, False, ["item"]),
    ],
)
def test_large_tables_and_the_item_table_are_looked_up(max_rows, with_candidates, expected):
    got = lookup_tables(MANIFEST, config(small_table_max_rows=max_rows), with_candidates)
    assert names(got) == expected


def test_a_table_of_context_alone_is_looked_up_in_finetuning():
    features = tuple(f for f in MANIFEST.features if f.name != "tags")  # leaves the tag table to context.interests
    manifest = dataclasses.replace(MANIFEST, features=features)
    for with_candidates, expected in ((True, ["item", "tag"]), (False, ["item"])):
        assert names(lookup_tables(manifest, config(small_table_max_rows=20), with_candidates)) == expected


def test_an_unused_table_is_not_looked_up():
    manifest = dataclasses.replace(MANIFEST, tables=(*MANIFEST.tables, schema.Table("brand", 900, "x")))
    assert "brand" not in names(lookup_tables(manifest, config(small_table_max_rows=0), True))


@pytest.mark.parametrize("options", [{"sharding": {"itme": "row_wise"}}, {"transfer": ("item", "itme")}], ids=str)
def test_unknown_table_names_are_errors(options):
    with pytest.raises(ValueError, match=r"\['itme'\].*'item', 'category'"):
        lookup_tables(MANIFEST, config(**options), True)


def test_freezing_a_table_that_is_not_looked_up_is_an_error():
    with pytest.raises(ValueError, match=r"cannot freeze tables \['category'\].*'item'"):
        Tables((MANIFEST.table("item"),), ("item", "category"), config(), CPU)


# --- values --------------------------------------------------------------------------------------------------------


def make_batch(lookup, rows=None, with_candidates=True):
    rows = make_rows(MANIFEST, "train", seed=3, num_rows=9) if rows is None else rows
    [batch] = Collate(MANIFEST, lookup, 10, with_candidates=with_candidates)(rows, BatchKey(0, 0, 0))
    return batch, rows


def sharded(lookup):
    return tuple(MANIFEST.table(name) for name in lookup)


def weight_of(tables, table):
    collection = tables.trainable if table in dict(tables.trainable.embeddings) else tables.frozen
    return collection.embeddings[table].weight


@pytest.mark.parametrize("frozen", [(), ("item",), ("item", "tag")])
def test_tables_give_the_looked_up_rows(frozen):
    lookup = ("item", "tag")
    tables = fill_(Tables(sharded(lookup), frozen, config(), CPU))
    batch, _ = make_batch(lookup)
    rows = tables(batch.lookup)
    for name in lookup:
        collection = tables.frozen if name in frozen else tables.trainable
        weight = collection.embeddings[name].weight
        torch.testing.assert_close(rows[name], weight[batch.lookup[name].values()], rtol=0, atol=0)
        assert rows[name].requires_grad == (name not in frozen)
    assert (tables.trainable is None) == (len(frozen) == 2) and (tables.frozen is None) == (not frozen)


@pytest.mark.parametrize("lookup", [("item",), ("item", "tag", "category"), ("item", "behaviour")], ids=str)
def test_token_is_the_sum_of_its_features_and_segment(lookup):
    batch, table = make_batch(lookup)
    tables = fill_(Tables(sharded(lookup), (), config(), CPU))
    embedder = fill_(TokenEmbedder(MANIFEST, config(), sharded(lookup)))
    got = embedder(tables(batch.lookup), batch)

    def weight(name):
        return weight_of(tables, name) if name in lookup else embedder.small[name].weight

    expected = []
    for place in ("history", "candidate"):
        segment = embedder.segment.weight[0 if place == "history" else 1]
        for row in batch.source_row_B.tolist():
            columns = {n.split(".")[1]: table[n][row].as_py() for n in table.column_names if n.startswith(place + ".")}
            for i in range(max(0, len(columns["item"]) - 10), len(columns["item"])):
                token = segment + weight("item")[columns["item"][i]] + weight("category")[columns["category"][i]]
                if columns["tags"][i]:  # an empty bag adds nothing
                    token = token + weight("tag")[columns["tags"][i]].sum(0) / len(columns["tags"][i])
                token = token + columns["price"][i] * embedder.numerical["price"]
                if place == "history":
                    token = token + weight("behaviour")[columns["behaviour"][i]]
                expected.append(token)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert "discount" not in embedder.numerical and "tab" not in embedder.small


def test_numerical_token_features_start_at_zero():
    embedder = TokenEmbedder(MANIFEST, config(), sharded(("item",)))
    assert (embedder.numerical["price"] == 0).all()


def test_initial_small_tables_have_the_configured_spread():
    torch.manual_seed(0)
    manifest = make_manifest(table_rows={"tag": 4000})
    embedder = TokenEmbedder(manifest, config(init_std=0.3), sharded(("item",)))
    assert embedder.small["tag"].weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_pretraining_tokens_have_no_candidates():
    rows = make_rows(MANIFEST, "pretrain", seed=3, num_rows=9)
    batch, _ = make_batch(("item",), rows, with_candidates=False)
    tables = fill_(Tables(sharded(("item",)), (), config(), CPU))
    got = TokenEmbedder(MANIFEST, config(), sharded(("item",)))(tables(batch.lookup), batch)
    assert got.shape == (batch.packing.num_history_tokens, WIDTH)


def test_bag_is_the_mean_and_empty_bags_are_zero():
    weight = torch.arange(12.0).view(4, 3).requires_grad_()
    bag = Bag(torch.tensor([1, 3, 3, 2]), torch.tensor([0, 0, 3, 4, 4]))
    out = embed(weight, bag)
    expected = torch.stack([torch.zeros(3), (weight[1] + 2 * weight[3]) / 3, weight[2], torch.zeros(3)])
    torch.testing.assert_close(out, expected)
    [gradient] = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0, 1 / 3, 1, 2 / 3]))


@pytest.mark.parametrize("lookup", [("item",), ("item", "tag", "tab")], ids=str)
def test_context_is_the_concatenation_of_its_features(lookup):
    batch, table = make_batch(lookup)
    tables = fill_(Tables(sharded(lookup), (), config(), CPU))
    embedder = fill_(ContextEmbedder(MANIFEST, config(), ModelConfig(context_dim=CONTEXT_WIDTH), sharded(lookup)))
    got = embedder(tables(batch.lookup), batch)
    wide = WIDTH if "tag" in lookup else CONTEXT_WIDTH  # a shared table keeps its own width
    assert (
        embedder.width == got.shape[1] == CONTEXT_WIDTH + wide + 1 + (WIDTH if "tab" in lookup else CONTEXT_WIDTH) + 1
    )

    def weight(feature, name):
        return weight_of(tables, name) if name in lookup else embedder.small[feature].weight

    expected = []
    for row in batch.source_row_B.tolist():
        columns = {name: table[name][row].as_py() for name in table.column_names}
        bag = columns["context.interests"]
        interests = weight("interests", "tag")[bag].sum(0) / max(len(bag), 1)
        request = [
            weight("segment", "segment")[columns["context.segment"]],
            interests,
            columns["context.age"] * embedder.numerical_scale["age"],
        ]
        for tab, discount in zip(columns["candidate.tab"], columns["candidate.discount"]):
            own = [weight("tab", "tab")[tab], discount * embedder.numerical_scale["discount"]]
            expected.append(torch.cat([*request, *own]))
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_context_without_features_has_no_width():
    features = tuple(f for f in MANIFEST.features if "history" in f.places)
    manifest = dataclasses.replace(MANIFEST, features=features)
    assert ContextEmbedder(manifest, config(), ModelConfig(context_dim=CONTEXT_WIDTH), sharded(("item",))).width == 0


@pytest.mark.parametrize("kept", ["candidate", "context"])
def test_context_of_one_place_alone(kept):
    features = tuple(f for f in MANIFEST.features if "history" in f.places or kept in f.places)
    manifest = dataclasses.replace(MANIFEST, features=features)
    batch, _ = make_batch(("item",))
    tables = fill_(Tables(sharded(("item",)), (), config(), CPU))
    embedder = ContextEmbedder(manifest, config(), ModelConfig(context_dim=CONTEXT_WIDTH), sharded(("item",)))
    assert embedder(tables(batch.lookup), batch).shape == (batch.packing.num_candidates, embedder.width)


def test_names_that_modules_use_themselves_are_fine_as_feature_names():
    assert [module_key(name) for name in ("item", "type", "values", "forward", "a.b")] == [
        "item",
        "type_",
        "values_",
        "forward_",
        "a_b",
    ]
    nn.ModuleDict({module_key(name): nn.Linear(1, 1) for name in ("type", "values", "keys", "training")})
