"""Small tables are replicated with the dense part, the others sharded: to cross the threshold is refused.

Their weights have another width and another optimizer; the message names the option that keeps them where they are.
"""

import pytest

from gpsd_dist.checkpoint import manager
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import NUM_TAGS, read_checkpoint, tiny_run

pytestmark = pytest.mark.timeout(300)

THRESHOLDS = {"small": NUM_TAGS, "sharded": NUM_TAGS - 1}  # of rows, at most which the table `tag` is small
OTHER = {"small": "sharded", "sharded": "small"}


def _pretraining(data_dir, output_dir, kind: str, max_steps: int):
    tables = {"small_table_max_rows": THRESHOLDS[kind]}
    return tiny_run("pretrain", data_dir, output_dir, tables=tables, train={"max_steps": max_steps})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data_dir, one_rank):
    """Root of `small` and `sharded`."""
    root = tmp_path_factory.mktemp("small_tables")
    for kind in THRESHOLDS:
        trainer = Trainer(_pretraining(data_dir, root / kind, kind, 2), one_rank)
        assert ("table tag:" in trainer.components.tables.plan) == (kind == "sharded")
        trainer.train()
    return root


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_resume_across_the_threshold_is_refused(pretrained, data_dir, one_rank, kind):
    run = _pretraining(data_dir, pretrained / kind, OTHER[kind], 4)
    words = f"tables.small_table_max_rows: {THRESHOLDS[kind]} there, {THRESHOLDS[OTHER[kind]]} now"
    with pytest.raises(ValueError, match=words):
        Trainer(run, one_rank)


@pytest.mark.parametrize("strategy", ["ST", "ST_SF", "FT", "FT_SF"])  # SF: the table is frozen
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_transfer_across_the_threshold_is_refused_with_the_option(
    pretrained, data_dir, tmp_path, one_rank, kind, strategy
):
    tables = {"small_table_max_rows": THRESHOLDS[OTHER[kind]], "transfer": ("item", "tag")}
    run = tiny_run("finetune", data_dir, tmp_path, strategy, pretrained / kind, tables=tables)
    words = rf"\['tag'\] {kind} there; set TablesConfig.small_table_max_rows={THRESHOLDS[kind]}, as it was there"
    if strategy.endswith("SF") and kind == "sharded":  # known before the checkpoint is looked at
        words = rf"cannot freeze tables \['tag'\]: .*small_table_max_rows={THRESHOLDS['small']} rows"
    with pytest.raises(ValueError, match=words):
        Trainer(run, one_rank).train()


def test_small_table_that_moves_with_the_tower_may_not_have_been_sharded(pretrained, data_dir, tmp_path, one_rank):
    tables = {"small_table_max_rows": THRESHOLDS["small"]}
    run = tiny_run("finetune", data_dir, tmp_path, "FT", pretrained / "sharded", tables=tables)
    with pytest.raises(ValueError, match=r"\['tag'\] sharded there"):
        Trainer(run, one_rank).train()


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_a_threshold_that_moves_no_table_changes_nothing_in_a_transfer(pretrained, data_dir, tmp_path, one_rank, kind):
    rows = {"small": NUM_TAGS + 1, "sharded": NUM_TAGS - 2}[kind]
    tables = {"small_table_max_rows": rows, "transfer": ("item",) if kind == "small" else ("item", "tag")}
    train = {"max_steps": 1}
    run = tiny_run("finetune", data_dir, tmp_path, "FT_SF", pretrained / kind, tables=tables, train=train)
    Trainer(run, one_rank).train()
    source, mine = (read_checkpoint(manager.find(folder))["table.item"] for folder in (pretrained / kind, tmp_path))
    assert bool(source.any()) and mine.equal(source)  # frozen
