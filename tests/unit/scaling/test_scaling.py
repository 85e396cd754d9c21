"""The command line; what it calls is tested in the files beside it and in integration/test_scaling.py."""

import json

import pytest

from gpsd_dist.scaling import __main__ as scaling
from tests.unit.scaling.test_epochs import write_run

LADDER = ["--ladder", "l1h32a4", "--strategy", "NT", "--gin_file", "configs/experiments/grocery_finetune.gin"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--ladder", "l1h32a4"], "--strategy, --gin_file missing"),
        ([], "--ladder, --strategy, --gin_file missing"),
        ([*LADDER, "--gin.SEED"], "unknown arguments ['--gin.SEED']"),
        ([*LADDER, "--gin.SEED", "1"], "unknown arguments ['--gin.SEED', '1']"),
        ([*LADDER, "--sed=1"], "unknown arguments ['--sed=1']"),
        ([*LADDER, "--with_test_each_epoch"], "belongs to --epochs_figure"),
        (["--epochs_figure", "a", "--seeds", "0"], "leave out the options of the ladder"),
        (["--epochs_figure", "a", "--gin.SEED=1"], "leave out the options of the ladder"),
    ],
)
def test_options_that_do_not_go_together(options, found, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        scaling.main(["--out_dir", str(tmp_path), *options])
    assert caught.value.code == 2 and found in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([*LADDER, "--ladder", "l1h33a4"], "ModelConfig: width 33 must be a multiple of 2 x heads"),
        ([*LADDER, "--seeds", "x"], "error: --seeds x"),
        ([*LADDER, "--gin.DATA_DIR=/nowhere"], "/nowhere"),
        ([*LADDER, "--nproc_per_node", "0"], "--nproc_per_node 0"),
        (["--epochs_figure", "/nowhere"], "error: /nowhere is not a run folder"),
    ],
)
def test_mistakes_end_with_one_message_and_status_2(options, found, tmp_path, capsys):
    assert scaling.main(["--out_dir", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert found in error and error.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_request_is_what_was_typed(tmp_path):
    args = scaling._parse(
        [*LADDER, "--out_dir", str(tmp_path), "--gin.EPOCHS=2", "--pretrain_gin_file", "p.gin", "--seeds", "1,2",
         "--pretrain_gin.EPOCHS=3", "--split", "valid", "--nproc_per_node", "2", "--embedding_dim_follows_width",
         "--gin_file", "more.gin"])  # fmt: skip
    assert args.overrides == ["--gin.EPOCHS=2"] and args.pretrain_overrides == ["--gin.EPOCHS=3"]
    assert args.gin_file == [LADDER[-1], "more.gin"] and args.pretrain_gin_file == ["p.gin"]
    assert (args.seeds, args.split, args.nproc_per_node) == ("1,2", "valid", 2)
    assert args.embedding_dim_follows_width and args.out_dir == tmp_path


def test_epochs_figure_reads_runs_and_leaves_them_alone(tmp_path, capsys):
    runs = [write_run(tmp_path / "runs" / "nt"), write_run(tmp_path / "runs" / "ft", "FT", auc=(0.8, 0.81))]
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    out = tmp_path / "out"
    assert scaling.main(["--epochs_figure", *map(str, runs), str(runs[0]), "--out_dir", str(out)]) == 0
    written = json.loads((out / "epochs.json").read_text())
    assert [run["strategy"] for run in written] == ["NT", "FT"]
    assert written[1]["valid_auc"] == {"click": [[1.0, 0.8], [2.0, 0.81]]} and written[1]["test_auc"] == {}
    assert sorted(path.name for path in out.iterdir()) == ["epochs.json", "epochs.png", "epochs.svg"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert "epochs.png" in capsys.readouterr().out


def test_test_split_is_not_scored_if_a_checkpoint_is_gone(tmp_path, capsys):
    run = write_run(tmp_path / "nt", kept=(4,))
    out = tmp_path / "out"
    assert scaling.main(["--epochs_figure", str(run), "--with_test_each_epoch", "--out_dir", str(out)]) == 2
    assert "keep_last=2" in capsys.readouterr().err and not out.exists()
