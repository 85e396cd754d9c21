"""What `evaluate` writes, without scoring anything. Real runs: tests/integration/test_evaluation.py."""

import json

import pytest

from gpsd_dist import evaluate
from gpsd_dist.checkpoint import storage


def test_metrics_of_a_crashed_write_are_those_of_before(tmp_path, monkeypatch):
    out = tmp_path / "new/test.json"
    evaluate._report({"click": {"auc": 0.5}}, out)

    def crash(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", crash)
        with pytest.raises(RuntimeError, match="killed"):
            evaluate._report({"click": {"auc": 0.75}}, out)
    assert json.loads(out.read_text()) == {"click": {"auc": 0.5}}
    evaluate._report({"click": {"auc": 0.75}}, out)
    assert json.loads(out.read_text()) == {"click": {"auc": 0.75}}
    assert [path.name for path in out.parent.iterdir()] == ["test.json"]
