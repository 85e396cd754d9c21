"""A ladder that is really trained, by the commands that it shows."""

import json
import shlex

import pytest

from gpsd_dist.checkpoint import loading, manager
from gpsd_dist.scaling import __main__ as scaling
from gpsd_dist.scaling import summary as summaries
from gpsd_dist.trainer import Trainer
from tests.helpers import forked
from tests.integration.test_command_line import TINY
from tests.integration.tiny_data import NUM_ITEMS, NUM_TAGS, tiny_run

EMBEDDING_DIM = 16  # of TINY


def command(folder, data_dir, out_dir, *options) -> list[str]:
    (folder / "tiny.gin").write_text(TINY)
    files = ["--gin_file", "configs/stage/finetune.gin", "--gin_file", str(folder / "tiny.gin")]
    return [*files, f"--gin.DATA_DIR={data_dir}", "--out_dir", str(out_dir), *options]


def with_pretraining(folder, data_dir, *overrides) -> list[str]:
    files = ["--pretrain_gin_file", "configs/stage/pretrain.gin", "--pretrain_gin_file", str(folder / "tiny.gin")]
    return [*files, f"--pretrain_gin.DATA_DIR={data_dir}", *(f"--pretrain_gin.{o}" for o in overrides)]


def saved_at(out_dir) -> dict:
    """When every file of every run was written."""
    return {path: path.stat().st_mtime_ns for path in out_dir.rglob("s?/**/*") if path.is_file()}


@pytest.mark.timeout(900)
def test_ladder_is_trained_once(tmp_path, data_dir, one_rank, capfd, monkeypatch):
    monkeypatch.setattr(summaries, "start_server", forked.command_server)
    start = tmp_path / "pretrain"
    Trainer(tiny_run("pretrain", data_dir, start, train={"max_steps": 2}), one_rank).train()
    out = tmp_path / "out"
    options = command(tmp_path, data_dir, out, "--ladder", "l1h16a2,l1h32a2", "--strategy", "ST_SF")
    options += ["--init_checkpoint", str(start), "--gin.EPOCHS=1"]
    capfd.readouterr()
    assert scaling.main(options) == 0, capfd.readouterr().err
    first, log = capfd.readouterr()
    summary = json.loads((out / "scaling_st_sf_test.json").read_text())
    shown = [line.split("$ ", 1)[1] for line in first.splitlines() if "] $ python" in line]
    assert shown == summary["commands"]
    assert [shlex.split(line)[2] for line in shown] == ["gpsd_dist.train", "gpsd_dist.evaluate"] * 2
    assert log.count(f"weights: ST_SF from {start}") == 2

    assert (summary["strategy"], summary["split"]) == ("ST_SF", "test")
    assert [(p["rung"], p["seed"], p["task"]) for p in summary["points"]] == [
        (rung, 0, task) for rung in ("l1h16a2", "l1h32a2") for task in ("click", "buy")]  # fmt: skip
    for point in summary["points"]:
        run = out / point["rung"] / "s0" / "st_sf"
        measured = json.loads((run / "test.json").read_text())[point["task"]]
        del measured["breakdown"]  # groups of rows, which no law is fitted to
        assert point | measured == point and point["embedding_dim"] == EMBEDDING_DIM
        assert point["table_parameters"] > (NUM_ITEMS + NUM_TAGS) * EMBEDDING_DIM
        stored = loading.saved_sizes(manager.find(run))
        weights = sum(size for name, size in stored.items() if name.startswith(("table.", "dense.")))
        assert point["dense_parameters"] + point["table_parameters"] == weights
        width, ffn = {"l1h16a2": (16, 64), "l1h32a2": (32, 96)}[point["rung"]]
        assert point["tower_parameters"] == 4 * width**2 + 3 * width * ffn + 3 * width  # attention, SwiGLU, norms
    assert summary["fits"] == {task: {"auc": None, "log_loss": None} for task in ("click", "buy")}
    assert "click auc: no fit is possible with 2 distinct sizes" in first
    assert (out / "scaling_st_sf_test.png").is_file() and (out / "scaling_st_sf_test.svg").is_file()

    before = saved_at(out)
    assert scaling.main(options) == 0
    again = capfd.readouterr().out
    assert "$ python" not in again and again.count("finished") == 2
    assert saved_at(out) == before and json.loads((out / "scaling_st_sf_test.json").read_text()) == summary

    assert scaling.main([*options, "--ladder", "l1h16a2"]) == 2  # would write a file that says less
    assert "scaling_st_sf_test.json also holds l1h32a2 seed 0" in capfd.readouterr().err
    assert saved_at(out) == before and json.loads((out / "scaling_st_sf_test.json").read_text()) == summary

    assert scaling.main([*options, "--gin.DENSE_LR=0.5"]) == 2
    error = capfd.readouterr().err
    assert "l1h16a2/s0/st_sf holds a run with other options: dense.peak_lr: 0.003 there, 0.5 now" in error
    assert saved_at(out) == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ladder_of_four_is_fitted_and_goes_on_where_it_stopped(tmp_path, data_dir, capfd):
    """Two processes, tables as wide as the tower, a rung that lost its last epoch, and test by epoch."""
    out = tmp_path / "out"
    options = command(tmp_path, data_dir, out, "--ladder", "l1h8a2,l1h16a2,l2h16a2,l1h32a2", "--strategy", "FT_SF")
    options += ["--embedding_dim_follows_width", "--nproc_per_node", "2", "--gin.TrainConfig.keep_last=9"]
    options += ["--gin.TrainConfig.eval_per_epoch=1"]  # so that the best checkpoint is the end of an epoch
    options += with_pretraining(tmp_path, data_dir, "TrainConfig.max_steps=2")
    assert scaling.main(options) == 0, capfd.readouterr().err
    first, log = capfd.readouterr()
    assert log.count("weights: random") == 4 and log.count("weights: FT_SF from") == 4
    summary = json.loads((out / "scaling_ft_sf_test.json").read_text())
    assert all(line.split()[2] == "gpsd_dist.launcher" for line in summary["commands"])
    widths = {point["rung"]: point["embedding_dim"] for point in summary["points"]}
    assert widths == {"l1h8a2": 8, "l1h16a2": 16, "l2h16a2": 16, "l1h32a2": 32}
    for task in ("click", "buy"):
        for metric in ("auc", "log_loss"):
            fit = summary["fits"][task][metric]
            assert fit["sizes"] == fit["points"] == 4 and fit["largest_left_out"]["sizes_fitted"] == 3
    assert "95 % intervals" in first

    run = out / "l2h16a2" / "s0" / "ft_sf"
    steps = sorted((run / "checkpoints").glob("step_*"))
    for path in steps[-1].iterdir():  # killed in the last epoch
        path.unlink()
    (run / "test.json").unlink()
    before = saved_at(out)
    assert scaling.main(options) == 0
    assert f"weights: resumed from {steps[-2]}" in capfd.readouterr().err
    after = saved_at(out)
    assert all(after[path] == at for path, at in before.items() if "l2h16a2" not in str(path))
    points = json.loads((out / "scaling_ft_sf_test.json").read_text())["points"]
    for again, earlier in zip(points, summary["points"], strict=True):
        assert again == pytest.approx(earlier)

    figure = ["--epochs_figure", str(run), "--with_test_each_epoch", "--out_dir", str(tmp_path / "figure")]
    assert scaling.main(figure) == 0
    (curves,) = json.loads((tmp_path / "figure" / "epochs.json").read_text())
    assert len(curves["test_auc"]["click"]) == 2  # EPOCHS of TINY
    best = next(p for p in summary["points"] if p["rung"] == "l2h16a2" and p["task"] == "click")
    assert any(value == pytest.approx(best["auc"]) for _, value in curves["test_auc"]["click"])
    capfd.readouterr()
    assert scaling.main(figure) == 0 and "$ python" not in capfd.readouterr().out
