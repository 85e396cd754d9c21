"""Models learn planted laws at the default options: the reduced set of `python -m benchmarks.laws`."""

import json

import pytest

from benchmarks.laws import __main__ as command
from benchmarks.laws import reduced


@pytest.mark.slow
def test_models_learn_planted_laws_at_the_default_options(tmp_path, capsys):
    assert command.main(["--reduced", "--out_dir", str(tmp_path)]) == 0, capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(reduced.LEAST_SHARE)


def test_a_model_that_learns_nothing_fails_it(tmp_path, monkeypatch, capsys):
    cell = next(cell for cell in reduced.LEAST_SHARE if cell.strategy == "NT")
    monkeypatch.setattr(reduced, "LEAST_SHARE", {cell: reduced.LEAST_SHARE[cell]})
    broken = ["--set", "dense/OptimizerConfig.peak_lr=0.0", "sparse/OptimizerConfig.peak_lr=0.0", "EPOCHS=1"]
    assert command.main(["--reduced", "--out_dir", str(tmp_path), *broken]) == 1
    assert "expected at least" in capsys.readouterr().out
