"""Transfer and freezing: exactly the tensors that a strategy names move, and a frozen table keeps every byte."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from gpsd_dist.checkpoint import manager
from gpsd_dist.config import STRATEGIES
from gpsd_dist.schema import read_manifest, write_manifest
from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    NUM_ITEMS,
    NUM_TAGS,
    differing,
    edit_state,
    read_checkpoint,
    step_folder,
    tiny_run,
    train_losses,
    train_runs,
    write_tiny_data,
)

pytestmark = pytest.mark.timeout(420)  # the fixture starts ranks, each call with its own limit of 150 s

FROZEN = ("ST_SF", "FT_SF")
TRANSFERRING = ("ST", "FT", "ST_SF", "FT_SF")
STEPS = 4


def _run(data_dir, source, output_dir, strategy: str, **changes):
    init = "" if strategy == "NT" else source
    changes = {"seed": 7, "train": {"max_steps": STEPS}} | changes
    return tiny_run("finetune", data_dir, output_dir, strategy, init, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_rank):
    """Root of `source` (pretraining, 1 rank) and of `<strategy>` (2 ranks, the random weights in `initial`)."""
    root = tmp_path_factory.mktemp("transfer")
    train_runs(0, 1, [tiny_run("pretrain", data_dir, root / "source", train={"max_steps": 4})])
    runs = [_run(data_dir, root / "source", root / strategy, strategy) for strategy in STRATEGIES]
    run_distributed(train_runs, 2, root, runs, timeout_s=300)
    return root


def _whole(assembly) -> dict[str, torch.Tensor]:
    """All weights of a run of one rank."""
    weights = assembly.weights()
    tables = {f"table.{name}": value.local_shards()[0].tensor.clone() for name, value in weights["table"].items()}
    return tables | {f"dense.{name}": value.clone() for name, value in weights["dense"].items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exactly_the_named_tensors_load(trained, data_dir, tmp_path, one_rank, strategy):
    source = read_checkpoint(manager.find(trained / "source"))
    trainer = Trainer(_run(data_dir, trained / "source", tmp_path, strategy), one_rank)
    random = _whole(trainer.components)
    trainer.load_weights()
    loaded = _whole(trainer.components)
    expected = set() if strategy == "NT" else {"table.item"}
    if strategy in ("FT", "FT_SF"):
        expected |= {name for name in loaded if name.startswith("dense.backbone.")}
        assert "dense.backbone.embedder.small.category.weight" in expected
        assert "dense.backbone.embedder.numerical.price" in expected
        assert "dense.backbone.tower.blocks.0.qkv.weight" in expected
    for name, value in loaded.items():
        assert torch.equal(value, source[name] if name in expected else random[name]), name
    # nothing is equal by accident: pretraining moved these, and another seed made the random ones
    assert all(not torch.equal(source[name], random[name]) for name in expected if "norm" not in name)
    assert not trainer.optimizer.state and trainer.step == 0


def test_several_tables_can_be_transferred(trained, data_dir, tmp_path, one_rank):
    source = read_checkpoint(manager.find(trained / "source"))
    run = _run(data_dir, trained / "source", tmp_path, "ST_SF", tables={"transfer": ("item", "tag")})
    trainer = Trainer(run, one_rank)
    trainer.train()
    trained_weights = _whole(trainer.components)
    for table in ("table.item", "table.tag"):
        assert torch.equal(trained_weights[table], source[table])
    assert not any(trainer.components.tables.optimizer_state().values())


def test_dense_weights_train_where_all_tables_are_frozen(trained, data_dir, tmp_path, one_rank):
    run = _run(data_dir, trained / "source", tmp_path, "ST_SF", tables={"transfer": ("item", "tag")})
    trainer = Trainer(run, one_rank)
    before = _whole(trainer.components)["dense.backbone.tower.blocks.0.qkv.weight"]
    trainer.train()
    assert not torch.equal(before, _whole(trainer.components)["dense.backbone.tower.blocks.0.qkv.weight"])


@pytest.mark.parametrize("strategy", TRANSFERRING)
def test_frozen_table_is_bit_identical_after_training(trained, strategy):
    source = read_checkpoint(manager.find(trained / "source"))
    after = read_checkpoint(step_folder(trained / strategy, STEPS))
    assert torch.equal(after["table.item"], source["table.item"]) == (strategy in FROZEN)
    assert differing({"": after["table.tag"]}, {"": read_checkpoint(trained / strategy / "initial")["table.tag"]})


def _kernel_tensor_sizes(collection) -> set[int]:
    """Numbers of elements of all tensors that the kernels of a sharded collection hold."""
    kernels = [kernel.emb_module for lookup in collection._lookups for kernel in lookup._emb_modules]
    assert kernels
    held = [tensor for kernel in kernels for tensor in (*kernel.parameters(), *kernel.buffers())]
    held += [value for kernel in kernels for value in vars(kernel).values() if isinstance(value, torch.Tensor)]
    return {tensor.numel() for tensor in held}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_table_has_no_optimizer_state(trained, data_dir, tmp_path, one_rank, strategy):
    saved = read_checkpoint(step_folder(trained / strategy, STEPS))
    assert ("table_optimizer.item.momentum1" in saved) == (strategy not in FROZEN)
    assert "table_optimizer.tag.momentum1" in saved
    trainer = Trainer(_run(data_dir, trained / "source", tmp_path, strategy), one_rank)
    trainer.train()
    tables = trainer.components.tables
    with_state = {name for name, state in tables.optimizer_state().items() if state}
    assert with_state == ({"tag"} if strategy in FROZEN else {"item", "tag"})
    # nothing in FBGEMM has an entry per row of a frozen table, whatever it is called; weights have 16
    sizes = _kernel_tensor_sizes(tables.module.module.frozen if strategy in FROZEN else tables.module.module.trainable)
    assert NUM_ITEMS * 16 in sizes or (NUM_ITEMS + NUM_TAGS) * 16 in sizes
    has_row_state = NUM_ITEMS in sizes or NUM_ITEMS + NUM_TAGS in sizes
    assert has_row_state == (strategy not in FROZEN), sizes
    assert [shard.is_frozen for shard in tables.shards if shard.table == "item"] == [strategy in FROZEN]


def test_rows_of_a_frozen_table_carry_no_gradient(trained, data_dir, tmp_path, one_rank):
    trainer = Trainer(_run(data_dir, trained / "source", tmp_path, "FT_SF"), one_rank)
    (batch,) = next(iter(trainer.loader))
    rows = trainer.components.tables(batch.lookup)
    assert not rows["item"].requires_grad and rows["tag"].requires_grad


def test_strategies_differ(trained):
    """Each strategy is another run: no two have the same loss after some steps."""
    last = {strategy: train_losses(trained / strategy)[STEPS] for strategy in STRATEGIES}
    assert len(set(last.values())) == len(STRATEGIES), last


def test_transfer_starts_from_the_best_checkpoint(trained, data_dir, tmp_path, one_rank):
    folder = tmp_path / "source"
    shutil.copytree(trained / "source", folder)
    best = step_folder(folder, 4)
    shutil.copytree(best, step_folder(folder, 9))
    assert manager.find(folder) == best
    assert manager.find(folder, "last") == step_folder(folder, 9)
    assert manager.find(step_folder(folder, 9)) == step_folder(folder, 9)


def _refused(run, runtime, match: str) -> str:
    with pytest.raises(ValueError, match=match) as error:
        Trainer(run, runtime).train()
    return str(error.value)


def test_a_warm_start_takes_every_table_and_the_heads(trained, data_dir, tmp_path, one_rank, caplog):
    warm = {"finetune": {"warm_start": True}}
    source = read_checkpoint(manager.find(trained / "FT_SF"))
    for strategy in ("FT", "FT_SF"):
        trainer = Trainer(_run(data_dir, trained / "FT_SF", tmp_path / strategy, strategy, **warm), one_rank)
        with caplog.at_level(logging.INFO):
            trainer.load_weights()
        loaded = _whole(trainer.components)
        assert {"table.tag", "dense.context.small.tab.weight"} <= set(loaded)
        assert [name for name, value in loaded.items() if not torch.equal(value, source[name])] == []
        assert not trainer.optimizer.state and trainer.step == 0
    assert "loaded table.tag (37, 16), trained on" in caplog.text and "table.item (61, 16), frozen" in caplog.text
    with pytest.raises(ValueError, match=r"takes the heads over too, and .* is a pretraining"):
        Trainer(_run(data_dir, trained / "source", tmp_path / "no", "FT", **warm), one_rank).load_weights()
    with pytest.raises(ValueError, match="set STRATEGY FT, or FT_SF"):
        _run(data_dir, trained / "FT", tmp_path / "no", "ST", **warm)


def test_a_warm_start_keeps_the_heads_as_they_were_built(trained, data_dir, tmp_path, one_rank, caplog):
    """A run of before `matches`, or with other options, must go on where 'auto' would add inputs to its heads."""
    options = {"finetune": {"warm_start": True}, "train": {"max_steps": 1}}
    options |= {"model": {"matches": True, "bag_matches": True}}
    run = _run(data_dir, trained / "FT", tmp_path / "warm", "FT", **options)
    Trainer(run, one_rank).train()
    assert "ModelConfig.matches is False, ModelConfig.bag_matches is False, that of" in caplog.text
    again = Trainer(run, one_rank)  # the same command goes on
    again.load_weights()
    assert again.step == 1 and not again.run.model.matches and not again.run.model.bag_matches
    wider = _run(data_dir, trained / "FT", tmp_path / "no", "FT", **options | {"model": {"context_dim": 8}})
    with pytest.raises(ValueError, match=r"other options: context_dim 4 there, 8 here; set .* leave out warm_start"):
        Trainer(wider, one_rank).load_weights()


def test_a_warm_start_keeps_the_offset_of_its_heads(data_dir, tmp_path, one_rank):
    """Heads that learnt a residual are as wide as others, and so are those that learnt none."""
    length, residual = {"train": {"max_steps": 1}}, {"offset": "discount"}
    for name, finetune in (("plain", {}), ("residual", residual)):
        train_runs(0, 1, [_run(data_dir, "", tmp_path / name, "NT", finetune=finetune, **length)])
    for name, finetune, different in (
        ("plain", residual, "offset '' there, 'discount' here"),
        ("residual", {}, "offset 'discount' there, '' here"),
        ("residual", residual | {"task_weights": {"click": 0.0}}, "task of the offset 'click' there, 'buy' here"),
    ):
        run = _run(data_dir, tmp_path / name, tmp_path / "no", "FT", finetune=finetune | {"warm_start": True})
        with pytest.raises(ValueError, match=f"has other options: {different}"):
            Trainer(run, one_rank).load_weights()


def test_a_pretraining_goes_on_with_the_scores_that_it_learnt(data_dir, tmp_path, one_rank):
    """The weights of two windows fit two others, too."""
    source, length = {"item_bias": True, "recent_days": (1.0, 7.0)}, {"train": {"max_steps": 1}}
    train_runs(0, 1, [tiny_run("pretrain", data_dir, tmp_path / "source", pretrain=source, **length)])
    for changed in ({"recent_days": (2.0, 7.0)}, {"item_bias": False}):
        options = {"pretrain": source | changed, **length}
        runs = [tiny_run("pretrain", data_dir, tmp_path / s, s, tmp_path / "source", **options) for s in ("FT", "ST")]
        with pytest.raises(ValueError, match=f"has other options: {next(iter(changed))} .* STRATEGY ST or ST_SF"):
            Trainer(runs[0], one_rank).load_weights()
        Trainer(runs[1], one_rank).load_weights()  # the tables alone


def test_unknown_transfer_table_is_refused(trained, data_dir, tmp_path, one_rank):
    run = _run(data_dir, trained / "source", tmp_path, "ST", tables={"transfer": ("item", "itme")})
    message = _refused(run, one_rank, "itme")
    assert "tag" in message  # says what there is


@pytest.mark.parametrize("strategy", ["ST", "ST_SF"])
def test_small_table_cannot_be_transferred_alone(trained, data_dir, tmp_path, one_rank, strategy):
    """`category` exists, but lives in the dense part."""
    run = _run(data_dir, trained / "source", tmp_path, strategy, tables={"transfer": ("category",)})
    assert "item" in _refused(run, one_rank, "category")  # says what there is


def test_table_that_pretraining_did_not_have_is_refused(trained, data_dir, tmp_path, one_rank):
    """`segment` is a context table: large enough here, but not part of a pretraining."""
    tables = {"transfer": ("item", "segment"), "small_table_max_rows": 8}
    message = _refused(_run(data_dir, trained / "source", tmp_path, "ST", tables=tables), one_rank, "table.segment")
    assert str(trained / "source") in message


def test_other_vocabulary_is_refused_with_both_sizes(trained, tmp_path, one_rank):
    write_tiny_data(tmp_path / "data", num_items=53)
    run = _run(tmp_path / "data", trained / "source", tmp_path / "run", "ST")
    message = _refused(run, one_rank, "another vocabulary")
    assert "61 rows there, 53 here" in message


def test_other_vocabulary_of_the_same_size_is_refused(trained, data_dir, tmp_path, one_rank):
    shutil.copytree(data_dir, tmp_path / "data")
    manifest = read_manifest(data_dir)
    tables = tuple(dataclasses.replace(t, fingerprint=f"other-{t.name}") for t in manifest.tables)
    write_manifest(dataclasses.replace(manifest, tables=tables), tmp_path / "data")
    run = _run(tmp_path / "data", trained / "source", tmp_path / "run", "FT_SF")
    assert "table 'item' has another" in _refused(run, one_rank, "table 'category' has another")


def test_small_vocabulary_matters_to_full_transfer_only(trained, data_dir, tmp_path, one_rank):
    shutil.copytree(data_dir, tmp_path / "data")
    manifest = read_manifest(data_dir)
    tables = tuple(dataclasses.replace(t, fingerprint="x") if t.name == "category" else t for t in manifest.tables)
    write_manifest(dataclasses.replace(manifest, tables=tables), tmp_path / "data")
    Trainer(_run(tmp_path / "data", trained / "source", tmp_path / "st", "ST"), one_rank).load_weights()
    message = _refused(_run(tmp_path / "data", trained / "source", tmp_path / "ft", "FT"), one_rank, "category")
    assert "item" not in message.split("category")[0]


@pytest.mark.parametrize("width", [8, 15])  # 15 is stored as 16: only the options tell
def test_other_embedding_width_is_refused(trained, data_dir, tmp_path, one_rank, width):
    run = _run(data_dir, trained / "source", tmp_path, "ST", tables={"embedding_dim": width})
    assert f"are 16 wide, this run's {width}" in _refused(run, one_rank, "set EMBEDDING_DIM=16")


def test_other_tower_is_refused_by_full_transfer(trained, data_dir, tmp_path, one_rank):
    run = _run(data_dir, trained / "source", tmp_path, "FT", model={"width": 32})
    message = _refused(run, one_rank, "does not fit")
    assert "dense.backbone.project_in.layers.1.weight is not in it" in message
    assert "dense.backbone.tower.blocks.0.qkv.weight has shape" in message
    Trainer(dataclasses.replace(run, strategy="ST"), one_rank).load_weights()  # needs the table alone


@pytest.mark.parametrize(
    ("model", "there", "here"),
    [
        ({"name": "transformer", "layers": 2, "heads": 4}, {}, {"heads": 2}),
        ({"name": "transformer", "layers": 2, "heads": 4}, {}, {"layers": 1}),
        ({"name": "hstu", "max_positions": 12}, {"heads": 1}, {"heads": 2}),
        ({"name": "hstu", "max_positions": 12}, {"time_bias": True}, {"time_bias": False}),
        ({"name": "din"}, {"parametrization": "official"}, {"parametrization": "by_width"}),
    ],
    ids=str,
)
def test_other_tower_of_fitting_shapes_is_refused(data_dir, tmp_path, one_rank, model, there, here):
    """Without the check it loads, and computes something else than what was trained."""
    stage = "finetune" if model["name"] == "din" else "pretrain"
    source = tiny_run(stage, data_dir, tmp_path / "source", model=model | there, train={"max_steps": 1})
    Trainer(source, one_rank).train()
    run = _run(data_dir, tmp_path / "source", tmp_path / "run", "FT", model=model | there | here)
    ((name, value),) = here.items()
    with pytest.raises(ValueError, match=f"has other options: {name} .* there, {value} here; set .* ST or ST_SF"):
        Trainer(run, one_rank).train()


def test_options_that_a_model_does_not_read_do_not_matter(data_dir, tmp_path, one_rank):
    """Finetuning on from a finetuned DIN, which has no layers, only their number in its options."""
    din = {"name": "din", "layers": 4}
    first = Trainer(tiny_run("finetune", data_dir, tmp_path / "source", model=din, train={"max_steps": 1}), one_rank)
    first.train()
    second = Trainer(_run(data_dir, tmp_path / "source", tmp_path / "run", "FT", model=din | {"layers": 1}), one_rank)
    second.load_weights()
    theirs, ours = (trainer.components.model.backbone.tower.state_dict() for trainer in (first, second))
    assert ours and all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("kind", ["missing", "empty", "half"])
def test_missing_checkpoint_is_refused(trained, data_dir, tmp_path, one_rank, kind):
    source = tmp_path / "source"
    if kind != "missing":
        source.mkdir()
    if kind == "half":
        shutil.copytree(trained / "source", source, dirs_exist_ok=True)
        for path in source.glob("checkpoints/step_*"):
            (path / manager.STATE_NAME).unlink()
    assert str(source) in _refused(_run(data_dir, source, tmp_path / "run", "ST"), one_rank, "checkpoint")


def test_missing_tensor_is_refused_not_skipped(trained, data_dir, tmp_path, one_rank):
    """A finetuned FT run is no pretraining, but has all that is needed; a pretraining of other features has not."""
    source = tmp_path / "source"
    shutil.copytree(trained / "source", source)
    path = step_folder(source, 4) / manager.STATE_NAME
    state = json.loads(path.read_text())
    for entry, key in [(e, "name") for e in state["manifest"]["tables"]] + [
        (e, "table") for e in state["manifest"]["features"]
    ]:
        entry[key] = "product" if entry[key] == "item" else entry[key]
    path.write_text(json.dumps(state))
    message = _refused(_run(data_dir, source, tmp_path / "run", "ST"), one_rank, "no table 'item'")
    assert str(source) in message


def test_frozen_table_in_fewer_bytes(trained, data_dir, tmp_path, one_rank):
    """Two ranks load it from the float32 checkpoint, train and save it as it is; one rank resumes and scores it."""
    source = read_checkpoint(manager.find(trained / "source"))["table.item"]
    wanted = source.half()
    tables = {"frozen_dtype": "fp16"}
    run = _run(data_dir, trained / "source", tmp_path / "run", "FT_SF", tables=tables)
    run_distributed(train_runs, 2, tmp_path, [run], timeout_s=150)
    saved = read_checkpoint(step_folder(tmp_path / "run", STEPS))["table.item"]
    assert saved.dtype == wanted.dtype and torch.equal(saved, wanted)
    assert saved.numel() * saved.element_size() <= source.numel() * source.element_size() / 2
    trainer = Trainer(dataclasses.replace(run, train=dataclasses.replace(run.train, max_steps=STEPS + 2)), one_rank)
    trainer.train()
    assert trainer.step == STEPS + 2 and torch.equal(_whole(trainer.components)["table.item"], wanted)
    (batch,) = next(iter(trainer.loader))
    rows = trainer.components.tables(batch.lookup)["item"]
    index = batch.lookup["item"].values()
    expected = source[index, :16]
    assert rows.dtype == torch.float32 and not torch.equal(rows, expected)
    bound = 2**-11 * expected.abs() + 2**-25  # half a unit of 11 bits
    assert ((rows - expected).abs() <= bound * (1 + 1e-4)).all()
    metrics = evaluate_checkpoint(tmp_path / "run", None, "valid", one_rank)
    assert all(np.isfinite(values["auc"]) for values in metrics.values())


def test_a_checkpoint_with_int8_rows_is_refused_with_the_commit_that_reads_it(trained, data_dir, tmp_path, one_rank):
    source = shutil.copytree(trained / "source", tmp_path / "source")
    for checkpoint in (source / "checkpoints").glob("step_*"):
        edit_state(checkpoint, lambda state: state["run_config"]["tables"].update(frozen_dtype="int8"))
    run = _run(data_dir, source, tmp_path / "run", "ST_SF")
    assert "commit 14e4532" in _refused(run, one_rank, "frozen_dtype 'int8' is not built any more")
    with pytest.raises(ValueError, match="commit 14e4532"):
        evaluate_checkpoint(source, str(data_dir), "valid", one_rank)
