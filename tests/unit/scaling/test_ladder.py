import argparse
import dataclasses
import json

import pytest

from gpsd_dist.checkpoint.state import RunState
from gpsd_dist.config import RunConfig, TablesConfig
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.scaling.ladder import Rung, parse_ladder, parse_seeds, plan
from tests.helpers.synthetic import make_manifest, write_dataset

FINETUNE, PRETRAIN = ("configs/experiments/grocery_finetune.gin",), ("configs/experiments/grocery_pretrain.gin",)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, seed=0, num_rows={"pretrain": 8, "train": 8, "valid": 8, "test": 8})
    return folder


@pytest.fixture
def request_for(tmp_path, data_dir):
    def make(strategy="FT_SF", ladder="l1h32a4,l4h64a4", **changes) -> argparse.Namespace:
        here = f"--gin.DATA_DIR={data_dir}"
        needs_pretraining = strategy != "NT" and not changes.get("init_checkpoint")
        options = {
            "ladder": ladder,
            "seeds": "0",
            "strategy": strategy,
            "out_dir": tmp_path / "out",
            "gin_file": FINETUNE,
            "overrides": (here,),
            "pretrain_gin_file": PRETRAIN if needs_pretraining else (),
            "pretrain_overrides": (here,) if needs_pretraining else (),
            "init_checkpoint": "",
            "split": "test",
            "nproc_per_node": 1,
            "embedding_dim_follows_width": False,
        }
        return argparse.Namespace(**options | changes)

    return make


def pretrained(folder, stage="pretrain", embedding_dim=64) -> str:
    """A run folder as far as planning reads it."""
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    run = RunConfig(stage, "data", str(folder), tables=TablesConfig(embedding_dim=embedding_dim))
    state = RunState(
        step=1,
        data_position={"epoch": 0, "step": 1, "order": {"rows": 1, "global_batch": 1}},
        progress={},
        metrics={},
        run_config=dataclasses.asdict(run),
        manifest=dataclasses.asdict(make_manifest()),
        world_size=1,
    )
    (checkpoint / "run_state.json").write_text(json.dumps(dataclasses.asdict(state)))
    return str(folder)


def test_ladder_keeps_its_order():
    rungs = parse_ladder("l24h1024a16, l1h32a4,L4H64A4")
    assert rungs == (Rung(24, 1024, 16), Rung(1, 32, 4), Rung(4, 64, 4))
    assert [rung.name for rung in rungs] == ["l24h1024a16", "l1h32a4", "l4h64a4"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "'' is not of the form l4h64a4"),
        ("l4h64", "'l4h64' is not of the form"),
        ("l4h64a4x", "'l4h64a4x' is not of the form"),
        ("l4h64a4;l4h32a4", "is not of the form"),
        ("l4h-64a4", "is not of the form"),
        ("l0h64a4", "l0h64a4: layers, width and heads must be at least 1"),
        ("l4h64a0", "must be at least 1"),
        ("l1h32a4,l4h64a4,l01h32a4", "l01h32a4 stands in it twice"),
        ("l1h0a4,nonsense", "l1h0a4: layers, .*'nonsense' is not of the form"),
    ],
)
def test_what_is_no_ladder_is_refused(text, found):
    with pytest.raises(ValueError, match=found):
        parse_ladder(text)


def test_widths_that_fit_the_heads_are_those_of_the_model(request_for):
    """Rotary pairs need twice the heads; HSTU has none: HSTU-large of MovieLens 1M is l8h50a2."""
    with pytest.raises(ValueError, match=r"WIDTH=50 .*width 50 must be a multiple of 2 x heads = 4"):
        plan(request_for("NT", ladder="l1h32a4,l8h50a2"))
    hstu = (*FINETUNE, "configs/model/hstu_large_ml1m.gin")
    (trial,) = plan(request_for("NT", ladder="l8h50a2", gin_file=hstu))
    assert (trial.finetuning.run.model.name, trial.finetuning.run.model.width) == ("hstu", 50)
    with pytest.raises(ValueError, match="width 50 must be a multiple of heads = 4"):
        plan(request_for("NT", ladder="l8h50a4", gin_file=hstu))


def test_rungs_that_are_the_same_model_are_refused(request_for):
    """DIN has no layers: l1h32a4 and l4h32a4 would be one model, trained twice."""
    din = (*FINETUNE, "configs/model/din.gin")
    with pytest.raises(ValueError, match=r"LAYERS=1 .*`LAYERS = 1` has no effect: model 'din' does not read it"):
        plan(request_for("NT", ladder="l1h32a4,l4h32a4", gin_file=din))
    widths = [trial.finetuning.run.model.width for trial in plan(request_for("NT", "l4h32a4,l4h64a4", gin_file=din))]
    assert widths == [32, 64]


def test_seeds():
    assert parse_seeds("0, 12,3") == (0, 12, 3)
    for text in ("", "a", "1,", "-1", "0.5"):
        with pytest.raises(ValueError, match="whole numbers separated by commas"):
            parse_seeds(text)
    with pytest.raises(ValueError, match="each seed once"):
        parse_seeds("1,2,1")


def parsed(command):
    """The RunConfig that a planned training would see."""
    assert command[:2] == ("-m", "gpsd_dist.train")
    return load_run_config(list(command[2:])).run


def test_trial_is_three_ordinary_commands(request_for, data_dir):
    trials = plan(request_for(seeds="0,7"))
    assert [(t.rung.name, t.seed) for t in trials] == [(r, s) for r in ("l1h32a4", "l4h64a4") for s in (0, 7)]
    home = request_for().out_dir / "l1h32a4" / "s7"
    pretraining, finetuning, scoring = trials[1].commands
    pretrained_run, run = parsed(pretraining), parsed(finetuning)
    assert (pretrained_run.stage, pretrained_run.output_dir) == ("pretrain", str(home / "pretrain"))
    assert (run.stage, run.strategy, run.output_dir) == ("finetune", "FT_SF", str(home / "ft_sf"))
    assert run.init_checkpoint == pretrained_run.output_dir
    for found in (pretrained_run, run):
        assert (found.model.layers, found.model.width, found.model.heads, found.seed) == (1, 32, 4, 7)
        assert found.tables.embedding_dim == 64  # that of the config: the tower projects
    assert (pretrained_run.train.epochs, run.train.epochs) == (15, 20)  # each from its own files
    assert (trials[1].pretraining.run, trials[1].finetuning.run) == (pretrained_run, run)
    result = home / "ft_sf" / "test.json"
    assert scoring == ("-m", "gpsd_dist.evaluate", "--checkpoint", str(home / "ft_sf"), "--data", str(data_dir),
                       "--split", "test", "--metrics_out", str(result))  # fmt: skip
    assert trials[1].result == result


def test_nt_has_no_pretraining(request_for):
    trial = plan(request_for("NT", split="valid"))[0]
    assert trial.pretraining is None and len(trial.commands) == 2
    assert parsed(trial.commands[0]).init_checkpoint == "" and trial.result.name == "valid.json"


def test_embedding_width_follows_the_tower_if_asked_to(request_for):
    for trial in plan(request_for(embedding_dim_follows_width=True)):
        for command in trial.commands[:2]:
            assert parsed(command).tables.embedding_dim == trial.rung.width
    kept = plan(request_for(overrides=(*request_for().overrides, "--gin.EMBEDDING_DIM=16")))
    assert {trial.finetuning.run.tables.embedding_dim for trial in kept} == {16}


def test_overrides_reach_the_stage_they_are_for(request_for):
    here = request_for().overrides
    trial = plan(request_for(overrides=(*here, "--gin.EPOCHS=3"), pretrain_overrides=(*here, "--gin.EPOCHS=2")))[0]
    assert (trial.pretraining.run.train.epochs, trial.finetuning.run.train.epochs) == (2, 3)


def test_one_pretraining_may_feed_all_rungs(request_for, tmp_path):
    start = pretrained(tmp_path / "pretrain")
    trials = plan(request_for("ST_SF", init_checkpoint=start))
    assert all(trial.pretraining is None for trial in trials)
    assert {trial.finetuning.run.init_checkpoint for trial in trials} == {start}


def test_several_processes_run_under_torchrun(request_for):
    for command in plan(request_for(nproc_per_node=2))[0].commands:
        assert command[:6] == ("-m", "gpsd_dist.launcher", "--nproc_per_node", "2", "--standalone", "-m")
        assert command[6] in ("gpsd_dist.train", "gpsd_dist.evaluate")


def test_requests_that_do_not_fit_are_refused(request_for, tmp_path, data_dir):
    start = pretrained(tmp_path / "pretrain")
    narrow = pretrained(tmp_path / "narrow", embedding_dim=32)
    here = f"--gin.DATA_DIR={data_dir}"
    elsewhere = ("--gin.DATA_DIR=/elsewhere",)
    mistakes = [
        (request_for("SF"), "--strategy 'SF' is not one of"),
        (request_for("NT", pretrain_gin_file=PRETRAIN), "NT starts from random weights"),
        (request_for("NT", init_checkpoint=start), "NT starts from random weights"),
        (request_for("ST", pretrain_gin_file=(), pretrain_overrides=()), "needs --pretrain_gin_file or .* none given"),
        (request_for("ST", init_checkpoint=start, pretrain_gin_file=PRETRAIN), "one of them; both given"),
        (request_for("FT_SF", init_checkpoint=start), "takes over the tower"),
        (request_for("NT", pretrain_overrides=("--gin.EPOCHS=1",)), "no pretraining is run"),
        (request_for(nproc_per_node=0), "--nproc_per_node 0"),
        (request_for(overrides=(here, "--gin.WIDTH=128")), "--gin.WIDTH=128: .* set by the ladder"),
        (request_for(pretrain_overrides=(here, "--gin.SEED=1")), "--gin.SEED=1: .* set by the ladder"),
        (request_for(overrides=(here, "--gin.EMBEDDING_DIM=8"), embedding_dim_follows_width=True), "set by the ladder"),
        (request_for(gin_file=PRETRAIN), "--gin_file .*grocery_pretrain.* stage 'pretrain', expected 'finetune'"),
        (request_for(pretrain_gin_file=FINETUNE), "--pretrain_gin_file .* stage 'finetune', expected 'pretrain'"),
        (request_for(pretrain_overrides=elsewhere), "would read /elsewhere and finetuning"),
        (request_for("NT", overrides=elsewhere), "/elsewhere"),
        (request_for(split="tset"), "tset"),
        (request_for("ST", init_checkpoint=str(tmp_path)), "neither a run folder"),
        (request_for("ST", init_checkpoint=pretrained(tmp_path / "f", "finetune")), "finetune run, not a pretraining"),
        (request_for("ST", init_checkpoint=narrow), "tables of width 32, l1h32a4 has 64"),
        (request_for("ST", init_checkpoint=start, embedding_dim_follows_width=True), "width 64, l1h32a4 has 32"),
        (request_for(overrides=(here, "--gin.EPOCSH=3")), "EPOCSH"),
    ]
    for request, message in mistakes:
        with pytest.raises(ValueError, match=message):
            plan(request)
    assert not request_for().out_dir.exists()


def test_config_that_fixes_the_width_itself_is_refused(request_for, tmp_path):
    stubborn = tmp_path / "stubborn.gin"
    stubborn.write_text("ModelConfig.width = 64\n")
    with pytest.raises(ValueError, match="WIDTH = 32` changed nothing"):
        plan(request_for("NT", gin_file=(*FINETUNE, str(stubborn))))
