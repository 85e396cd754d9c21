"""Which runs a fit plans, and what it refuses before it trains anything."""

import pathlib

import pytest

from gpsd_dist.fit.__main__ import parse
from gpsd_dist.fit.plan import make_plan


def args(*options: str):
    return parse(["--data", "/data", "--out", "/runs", "--nproc", "1", *options])


def folders(plan) -> list[str]:
    return [str(one.training.folder) for one in plan.contestants]


def test_the_default_is_one_model_with_three_strategies():
    plan = make_plan(args(), can_pretrain=True)
    assert [str(one.folder) for one in plan.pretrainings] == ["/runs/l4h64a4/pretrain"]
    assert folders(plan) == [f"/runs/l4h64a4/{name}" for name in ("nt", "st_sf", "ft_sf")]
    assert [one.label for one in plan.contestants] == ["NT", "ST_SF", "FT_SF"] and not plan.notes
    last = plan.contestants[-1]
    assert (last.training.run.strategy, last.training.run.init_checkpoint) == ("FT_SF", "/runs/l4h64a4/pretrain")
    assert last.refit.run.refit_of == "/runs/l4h64a4/ft_sf" and str(last.refit.folder) == "/runs/l4h64a4/ft_sf_refit"
    assert last.training.command[:4] == ("-m", "gpsd_dist.train", "--gin_file", "configs/stage/finetune.gin")


def test_options_of_training_are_those_of_the_files():
    """A fit adds folders, strategy and seed, and nothing else: what depends on the data is train's business."""
    plan = make_plan(args("--seed", "3"), can_pretrain=True)
    own = ("DATA_DIR", "OUTPUT_DIR", "STRATEGY", "INIT_CHECKPOINT", "SEED", "REFIT_OF")
    for training in (*plan.pretrainings, *(part for one in plan.contestants for part in (one.training, one.refit))):
        given = [part.removeprefix("--gin.").split("=")[0] for part in training.command if part.startswith("--gin.")]
        assert set(given) <= set(own) and training.run.seed == 3


def test_a_model_without_pretraining_starts_from_that_of_another():
    plan = make_plan(args("--models", "din,l1h32a4"), can_pretrain=True)
    assert [str(one.folder) for one in plan.pretrainings] == ["/runs/l1h32a4/pretrain"]
    assert folders(plan)[:2] == ["/runs/din/nt", "/runs/din/st_sf"] and len(plan.contestants) == 5
    assert plan.contestants[1].training.run.init_checkpoint == "/runs/l1h32a4/pretrain"
    assert plan.contestants[1].label == "din ST_SF"
    assert plan.notes == ("din has no generative pretraining of its own: FT_SF is left out for it",)
    alone = make_plan(args("--models", "din"), can_pretrain=True)
    assert [str(one.folder) for one in alone.pretrainings] == ["/runs/l4h64a4/pretrain"]


def test_without_histories_before_the_training_period_only_nt_is_left():
    plan = make_plan(args(), can_pretrain=False)
    assert folders(plan) == ["/runs/l4h64a4/nt"] and not plan.pretrainings
    assert plan.notes == (
        "the data have no histories before the training period (split `pretrain`): only NT is trained",
    )


def test_gin_files_may_say_what_the_model_is():
    options = []
    for stage, option in (("finetune", "--gin_file"), ("pretrain", "--pretrain_gin_file")):
        options += [option, f"configs/experiments/quickstart_{stage}.gin"]
    plan = make_plan(args(*options, "--gin.EPOCHS=1", "--pretrain_gin.EPOCHS=2"), can_pretrain=True)
    assert folders(plan) == [f"/runs/{name}" for name in ("nt", "st_sf", "ft_sf")]
    assert plan.pretrainings[0].run.train.epochs == 2 and plan.contestants[0].training.run.train.epochs == 1
    assert pathlib.Path(plan.contestants[0].training.run.data_dir) == pathlib.Path("/data")


def test_several_processes_run_under_the_launcher():
    plan = make_plan(args("--nproc", "3"), can_pretrain=True)
    assert plan.pretrainings[0].command[:6] == (
        "-m",
        "gpsd_dist.launcher",
        "--nproc_per_node",
        "3",
        "--standalone",
        "-m",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--models", "l4h64"], r"--models: there is no 'l4h64'; did you mean 'l4h64a4'\?; configs/model has "),
        (["--strategies", "NT,SF"], "--strategies: SF is not one of NT, ST, FT, ST_SF, FT_SF"),
        (["--gin.SEED=4"], "--gin.SEED=4: DATA_DIR, .* are set by fit .*; leave it out"),
        (["--pretrain_gin.OUTPUT_DIR=x"], "OUTPUT_DIR, .* are set by fit"),
        (["--gin.EMBEDDING_DIM=32"], "ST_SF: EMBEDDING_DIM is 64 in pretraining and 32 in finetuning: give --gin.NAME"),
        (["--gin.LAYERS=2"], "FT_SF: LAYERS is 4 in pretraining and 2 in finetuning"),
        (["--gin.EPOCHS=no"], "finetune with .*EPOCHS.*no"),
        (["--models", "din", "--strategies", "FT_SF"], "nothing is left to train: din has no generative pretraining"),
        (["--gin_file", "configs/stage/pretrain.gin"], "describes stage 'pretrain', expected 'finetune'"),
    ],
)
def test_mistakes_show_before_anything_is_trained(options, words):
    with pytest.raises(ValueError, match=words):
        make_plan(args(*options), can_pretrain=True)


@pytest.mark.parametrize("options", [["--nproc", "0"], ["--budget_minutes", "0"], ["--epochs", "3"], ["--gin.EPOCHS"]])
def test_options_that_do_not_exist(options):
    with pytest.raises(SystemExit):
        args(*options)
