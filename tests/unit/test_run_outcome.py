"""What a run says at its end: floors, warnings and the next command. How it reads after a real run: test_outcome.py."""

import logging
import math
import types

import pytest

from gpsd_dist import run_outcome


def _words(name, value, half_width, floors):
    made = list(run_outcome.warnings(name, value, half_width, floors))
    assert all(level == logging.WARNING for level, _ in made)
    return [line for _, line in made]


def test_a_good_model_on_enough_data_gives_no_warning():
    assert not _words("click/auc", 0.7, 0.01, {"popularity": 0.6, "smoothed rates": 0.65})
    assert not _words("next_item/mrr", 0.6, math.nan, {"popularity": 0.1})


@pytest.mark.parametrize(
    ("value", "half_width", "floors", "words"),
    [
        (0.7, 0.08, {}, "too thin to tell: valid knows an AUC to +- 0.080 only"),
        (0.507, 0.02, {}, "valid click/auc 0.507 is not clearly above 0.5"),
        (0.6, 0.01, {"popularity": 0.55, "smoothed rates": 0.625}, "below smoothed rates: 0.6000 < 0.6250"),
    ],
)
def test_what_is_wrong_is_a_warning(value, half_width, floors, words):
    (line,) = _words("click/auc", value, half_width, floors)
    assert words in line


def _trainer(stage, **run):
    return types.SimpleNamespace(
        run=types.SimpleNamespace(stage=stage, data_dir="data/my log", output_dir="runs/a/pretrain", **run)
    )


def test_next_command_of_a_finetuning_scores_it():
    command = run_outcome.next_command(_trainer("finetune"), ["--gin_file", "configs/stage/finetune.gin"])
    assert command == (
        "python -m gpsd_dist.evaluate --checkpoint runs/a/pretrain --split test --metrics_out runs/a/pretrain/test.json"
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["configs/stage/pretrain.gin", "configs/model/l1h32a4.gin"], "configs/stage/finetune.gin"),
        (["configs/experiments/grocery_pretrain.gin"], "configs/experiments/grocery_finetune.gin"),
        (["/elsewhere/my_own_pretrain.gin"], "configs/stage/finetune.gin"),
        (["/elsewhere/mine.gin"], "configs/stage/finetune.gin"),
    ],
)
def test_next_command_of_a_pretraining_finetunes_the_same_model(files, expected):
    argv = [part for file in files for part in ("--gin_file", file)] + ["--gin.WIDTH=32", "--gin.EPOCHS=2"]
    command = run_outcome.next_command(_trainer("pretrain"), argv)
    same = [f"--gin_file={file}" for file in files] + ["--gin.WIDTH", "32", "--gin.EPOCHS", "2"]
    assert run_outcome.next_command(_trainer("pretrain"), same) == command
    others = "".join(f" --gin_file {file}" for file in files[1:])
    assert command == (
        f"python -m gpsd_dist.train --gin_file {expected}{others} --gin.WIDTH=32 '--gin.DATA_DIR=data/my log' "
        "--gin.STRATEGY=FT_SF --gin.INIT_CHECKPOINT=runs/a/pretrain --gin.OUTPUT_DIR=runs/a/ft_sf"
    )
