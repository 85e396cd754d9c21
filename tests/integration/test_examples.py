"""The examples of the documentation run, learn something, and stay short enough to be read."""

import json
import math
import pathlib
import shlex
import subprocess
import sys

import pytest

from examples import train_minimal
from tests.helpers.commands import TINY_GIN, environment

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_minimal_training_learns_and_fits_on_two_screens(tmp_path, capsys):
    losses = train_minimal.train(tmp_path, num_steps=40)
    assert len(losses) == 40 and all(math.isfinite(loss) for loss in losses)
    # 1 item of 1 + 256 by chance: ln 257 = 5.55; the first step is above it, because similarities are still noise
    assert losses[0] > 5 and max(losses[-5:]) < 3
    assert "step   40  next_item" in capsys.readouterr().out
    assert len((REPO_ROOT / "examples" / "train_minimal.py").read_text().splitlines()) <= 120


PLUGIN = str(REPO_ROOT / "examples" / "own_model.py")


def gpsd_dist(folder: pathlib.Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gpsd_dist", *command],
        cwd=folder,
        env=environment(PYTHONPATH=str(REPO_ROOT)),
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_a_model_outside_of_the_package_trains_on_two_ranks_and_is_evaluated(data_dir, tmp_path):
    (tmp_path / "tiny.gin").write_text(TINY_GIN + "EPOCHS = 1\nModelConfig.name = 'best_match'\n")
    files = ["--gin_file", "stage/finetune.gin", "--gin_file", "tiny.gin"]
    where = [f"--gin.DATA_DIR={data_dir}", "--gin.OUTPUT_DIR=run"]
    refused = gpsd_dist(tmp_path, "train", *files, *where)
    assert refused.returncode == 2 and "a model of your own: --plugin FILE" in refused.stderr
    trained = gpsd_dist(tmp_path, "train", "--nproc", "2", "--plugin", PLUGIN, *files, *where)
    assert trained.returncode == 0, trained.stderr
    assert "finetune NT, best_match H16 on 2 x cpu" in trained.stderr
    assert f"next: GPSD_PLUGIN={shlex.quote(PLUGIN)} gpsd-dist evaluate --checkpoint run --split test" in trained.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["plugin"] == PLUGIN
    scored = gpsd_dist(tmp_path, "evaluate", "--plugin", PLUGIN, "--checkpoint", "run", "--metrics_out", "test.json")
    assert scored.returncode == 0, scored.stderr
    assert {*json.loads((tmp_path / "test.json").read_text())} == {"click", "buy"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["own_model", "notebook"])
def test_example_runs(name):
    command = [sys.executable, "-m", f"examples.{name}"]
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment(), capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    assert (
        ("best valid click/auc" in done.stderr) if name == "own_model" else ("probabilities of a click:" in done.stdout)
    )
    assert len((REPO_ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 80
