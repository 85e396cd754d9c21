"""The examples of the documentation run, learn something, and stay short enough to be read."""

import math
import pathlib

from examples import train_minimal

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_minimal_training_learns_and_fits_on_two_screens(tmp_path, capsys):
    losses = train_minimal.train(tmp_path, num_steps=40)
    assert len(losses) == 40 and all(math.isfinite(loss) for loss in losses)
    # 1 item of 1 + 256 by chance: ln 257 = 5.55; the first step is above it, because similarities are still noise
    assert losses[0] > 5 and max(losses[-5:]) < 3
    assert "step   40  next_item" in capsys.readouterr().out
    assert len((REPO_ROOT / "examples" / "train_minimal.py").read_text().splitlines()) <= 120
