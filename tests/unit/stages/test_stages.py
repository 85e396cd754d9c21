import dataclasses
import math
import types

import pytest
import torch
from torch import nn

from gpsd_dist.config import NEGATIVES_PER, FinetuneConfig, ModelConfig, PretrainConfig, RunConfig, TablesConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.model.gpsd import NextItemModel, RankingModel
from gpsd_dist.schema import Task
from gpsd_dist.stages import registry
from gpsd_dist.stages.finetune import Finetune, trained_tasks
from gpsd_dist.stages.next_behaviour import next_behaviour
from gpsd_dist.stages.pretrain import Pretrain
from gpsd_dist.tables.collections import Tables, lookup_tables
from tests.helpers.reference import fill_
from tests.helpers.synthetic import make_manifest, make_rows

NAN = math.nan
MANIFEST = make_manifest()
CLICK, BUY = MANIFEST.tasks
LABELS = {"click": torch.tensor([0.0, 1, 1, NAN, 0, 1]), "buy": torch.tensor([NAN, 1, 0, 1, 1, NAN])}
LOGITS = {"click": torch.tensor([0.3, -1, 2, 0.1, 0.7, 1.5]), "buy": torch.tensor([1.0, 0.2, -0.4, 3, -2, 0.6])}


class Fixed(nn.Module):
    """Stands for a model with these logits."""

    def forward(self, rows, batch):
        return LOGITS


BATCH = types.SimpleNamespace(labels=LABELS, sampling={})


def finetune(tasks=MANIFEST.tasks, name="transformer", **options):
    run = RunConfig("finetune", "data", "out", finetune=FinetuneConfig(**options), model=ModelConfig(name=name))
    return Finetune(run, dataclasses.replace(MANIFEST, tasks=tasks))


def entropy(probability, label):
    return -math.log(probability if label else 1 - probability)


def p(task, index):
    return 1 / (1 + math.exp(-LOGITS[task][index].item()))


def ranking(name, weight, num_rows=8):
    tables_config = TablesConfig(embedding_dim=8)
    sharded = lookup_tables(MANIFEST, tables_config, with_candidates=True)
    collate = Collate(MANIFEST, tuple(table.name for table in sharded), 20, True)
    [batch] = collate(make_rows(MANIFEST, "train", seed=0, num_rows=num_rows), BatchKey(0, 0, 0))
    rows = fill_(Tables(sharded, (), tables_config, torch.device("cpu")))(batch.lookup)
    model = RankingModel(MANIFEST, tables_config, ModelConfig(name=name, width=16), sharded, ("click", "buy"))
    return finetune(name=name, next_behaviour_weight=weight), fill_(model), rows, batch


@pytest.mark.parametrize("name", ["dien", "dmin"])
def test_next_behaviour_is_one_more_loss_over_tokens_that_have_a_predecessor(name):
    plain, model, rows, batch = ranking(name, 0.0)
    stage = ranking(name, 0.5)[0]
    assert list(stage.loss_weights.items()) == [("click", 1.0), ("buy", 1.0), ("next_behaviour", 0.5)]
    lengths = batch.packing.history_offsets.diff()
    assert stage.counts(batch).tolist() == [*plain.counts(batch).tolist(), (lengths - 1).clamp(min=0).sum()]

    torch.manual_seed(3)
    sums = stage.loss_sums(model, rows, batch)
    torch.testing.assert_close(sums[:2], plain.loss_sums(model, rows, batch), rtol=0, atol=0)
    _, history = model(rows, batch, with_history=True)
    item, position = batch.history_item_T, batch.packing.position_S[: len(batch.history_item_T)]
    torch.manual_seed(3)
    negative = torch.randint(len(item), item.shape)
    torch.testing.assert_close(sums[2], next_behaviour(*history, position, item, negative))
    assert sums[2] > 0 and len(negative.unique()) > len(negative) / 4


@pytest.mark.parametrize("num_rows", [8, 0])
def test_next_behaviour_reaches_every_parameter_that_the_task_does(num_rows):
    stage, model, rows, batch = ranking("dien", 0.5, num_rows)
    stage.loss_sums(model, rows, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_task_with_the_name_of_the_auxiliary_loss_is_an_error():
    manifest = dataclasses.replace(MANIFEST, tasks=(Task("next_behaviour"),))
    assert trained_tasks(FinetuneConfig(), manifest)
    with pytest.raises(ValueError, match="rename it"):
        trained_tasks(FinetuneConfig(next_behaviour_weight=0.1), manifest)


def test_conditional_task_counts_where_the_other_label_is_one():
    stage = finetune()
    assert stage.counts(BATCH).tolist() == [5, 2]  # buy: candidates 1 and 2; 5 was clicked, but nobody knows
    click = sum(entropy(p("click", i), LABELS["click"][i]) for i in (0, 1, 2, 4, 5))
    buy = entropy(p("buy", 1), 1) + entropy(p("buy", 2), 0)
    torch.testing.assert_close(stage.loss_sums(Fixed(), {}, BATCH), torch.tensor([click, buy]))


def test_esmm_trains_the_product_over_all_candidates():
    stage = finetune(esmm=True)
    assert stage.counts(BATCH).tolist() == [5, 4]  # 0 and 4 were not clicked: not bought; 3 and 5 are unknown
    product = {0: 0, 1: 1, 2: 0, 4: 0}
    buy = sum(entropy(p("click", i) * p("buy", i), label) for i, label in product.items())
    click = sum(entropy(p("click", i), LABELS["click"][i]) for i in (0, 1, 2, 4, 5))
    torch.testing.assert_close(stage.loss_sums(Fixed(), {}, BATCH), torch.tensor([click, buy]))


RATE, WEIGHT = torch.tensor([0.1, 0.5, 0.1, 0.5, 0.1, 1.0]), torch.tensor([2.0, 0.5, 1, 7, 0, 3])
SAMPLED = types.SimpleNamespace(labels=LABELS, sampling={"negative_rate": RATE, "weight": WEIGHT})


def kept(index):
    """Chance of a click among the rows that a log keeps which has all clicks, and of others the share RATE."""
    clicked, other = p("click", index), (1 - p("click", index)) * RATE[index].item()
    return clicked / (clicked + other)


@pytest.mark.parametrize("esmm", [False, True])
def test_the_loss_of_a_sampled_log_is_that_of_the_rows_that_were_kept(esmm):
    """What was not clicked was sampled. Given a click, nothing was, so buys stay as they are."""
    stage = finetune(esmm=esmm)
    weight = dict(enumerate(WEIGHT.tolist()))
    click = sum(weight[i] * entropy(kept(i), LABELS["click"][i]) for i in (0, 1, 2, 4, 5))
    rows = {0: 0, 1: 1, 2: 0, 4: 0} if esmm else {1: 1, 2: 0}
    buy = sum(weight[i] * entropy((kept(i) if esmm else 1) * p("buy", i), label) for i, label in rows.items())
    torch.testing.assert_close(stage.loss_sums(Fixed(), {}, SAMPLED), torch.tensor([click, buy]))
    assert stage.counts(SAMPLED).tolist() == [2 + 0.5 + 1 + 0 + 3, sum(weight[i] for i in rows)]


def test_ranking_weights_are_named_in_order_and_default_to_one():
    stage = finetune(task_weights={"buy": 0.5})
    assert list(stage.loss_weights.items()) == [("click", 1.0), ("buy", 0.5)]


def test_a_conditional_task_needs_no_head_of_the_other():
    stage = finetune(task_weights={"click": 0.0})
    assert stage.counts(BATCH).tolist() == [2]
    assert stage.loss_sums(Fixed(), {}, BATCH).shape == (1,)


@pytest.mark.parametrize(
    ("weights", "esmm", "expected"),
    [
        ({}, False, ["click", "buy"]),
        ({"buy": 0.0}, True, ["click"]),
        ({"click": 0.0}, False, ["buy"]),
        ({"click": 0.1, "buy": 3.0}, True, ["click", "buy"]),
    ],
)
def test_trained_tasks_are_those_with_a_weight(weights, esmm, expected):
    config = FinetuneConfig(task_weights=weights, esmm=esmm)
    assert [task.name for task in trained_tasks(config, MANIFEST)] == expected


@pytest.mark.parametrize(
    ("weights", "esmm", "words"),
    [
        ({"bye": 1.0}, False, r"\['bye'\].*'click', 'buy'"),
        ({"click": 0.0}, True, "ESMM trains 'buy' through 'click'"),
        ({"click": 0.0, "buy": 0.0}, False, "no task to train"),
    ],
)
def test_task_weights_that_do_not_fit_are_errors(weights, esmm, words):
    with pytest.raises(ValueError, match=words):
        trained_tasks(FinetuneConfig(task_weights=weights, esmm=esmm), MANIFEST)


def test_three_tasks_in_another_order():
    tasks = (Task("buy", given="click"), Task("like"), Task("click"))
    manifest = dataclasses.replace(MANIFEST, tasks=tasks)
    kept = trained_tasks(FinetuneConfig(task_weights={"like": 0.0}), manifest)
    assert finetune(kept).counts(BATCH).tolist() == [2, 5]


# --- pretraining ---------------------------------------------------------------------------------------------------


def pretraining(rows, negatives_per="group", num_parts=1):
    tables_config = TablesConfig(embedding_dim=8)
    config = PretrainConfig(auxiliary=("category",), auxiliary_weight=0.25, temperature=0.2)
    sharded = lookup_tables(MANIFEST, tables_config, with_candidates=False)
    lookup = tuple(table.name for table in sharded)
    options = {"negatives_per": negatives_per, "num_negative_groups": 3, "num_negatives": 4, "num_parts": num_parts}
    batches = Collate(MANIFEST, lookup, 20, False, **options)(rows, BatchKey(0, 0, 0))
    tables = fill_(Tables(sharded, (), tables_config, torch.device("cpu")))
    model = NextItemModel(MANIFEST, tables_config, ModelConfig(layers=1, width=16, heads=2), sharded, config.auxiliary)
    run = RunConfig("pretrain", "data", "out", pretrain=config)
    return Pretrain(run, MANIFEST), fill_(model), tables, batches


@pytest.mark.parametrize("negatives_per", ["group", "position"])
def test_next_item_sums_compare_each_state_with_the_next_token(negatives_per):
    rows = make_rows(MANIFEST, "pretrain", seed=0, num_rows=8)
    stage, model, tables, [batch] = pretraining(rows, negatives_per)
    rows = tables(batch.lookup)
    assert list(stage.loss_weights.items()) == [("next_item", 1.0), ("next_category", 0.25)]
    hidden = model(rows, batch).hidden_TE
    unit = nn.functional.normalize(tables.trainable.embeddings["item"].weight, dim=-1)
    category = nn.functional.normalize(model.backbone.embedder.small["category"].weight, dim=-1)
    item_sum = category_sum = count = 0
    targets = batch.next_item
    pairs = zip(targets.token_M.tolist(), targets.item_M.tolist(), targets.target["category"].tolist(), strict=True)
    for position, (token, item, next_category) in enumerate(pairs):
        query = nn.functional.normalize(hidden[token], dim=-1) / 0.2
        group = position
        if negatives_per == "group":
            group = next(g for g in range(3) if batch.next_item.group_offsets[g + 1] > position)
        others = [i for i in batch.next_item.negative_item_GN[group].tolist() if i != item]
        item_sum -= (unit[[item, *others]] @ query).log_softmax(0)[0]
        category_sum -= (category @ query).log_softmax(0)[next_category]
        count += 1
    assert stage.counts(batch).tolist() == [count, count] and count > 50
    torch.testing.assert_close(
        stage.loss_sums(model, rows, batch), torch.stack([item_sum, category_sum]), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_category_sums_and_counts_do_not_depend_on_micro_batches(num_parts):
    rows = make_rows(MANIFEST, "pretrain", seed=0, num_rows=10)
    totals = []
    for parts in (1, num_parts):
        stage, model, tables, batches = pretraining(rows, num_parts=parts)
        looked_up = tables(batches[0].lookup)
        counts = sum(stage.counts(batch) for batch in batches)
        totals.append((counts, sum(stage.loss_sums(model, looked_up, batch)[1] for batch in batches)))
    torch.testing.assert_close(totals[0], totals[1])


@pytest.mark.parametrize("negatives_per", NEGATIVES_PER)
def test_empty_batches_count_nothing_and_still_run(negatives_per):
    empty = make_rows(MANIFEST, "pretrain", seed=0, num_rows=3).slice(0, 0)
    stage, model, tables, [batch] = pretraining(empty, negatives_per)
    sums = stage.loss_sums(model, tables(batch.lookup), batch)
    assert stage.counts(batch).tolist() == [0, 0] and sums.tolist() == [0, 0]
    sums.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pretraining_counts_the_tokens_that_another_one_follows():
    stage, _, _, [batch] = pretraining(make_rows(MANIFEST, "pretrain", seed=1, num_rows=6))
    assert 0 < stage.counts(batch)[0] <= batch.packing.num_history_tokens < batch.num_read_tokens
    assert stage.counts(batch).tolist() == [len(batch.next_item.token_M)] * 2


def test_a_misspelt_stage_is_named_with_what_there_is():
    with pytest.raises(ValueError, match=r"'pretrian' is not one of \('pretrain', 'finetune'\); did you mean"):
        registry.find("pretrian")
