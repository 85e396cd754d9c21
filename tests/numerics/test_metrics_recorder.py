"""Recorder on two ranks: one collective reduces everything, and ranks that disagree are told so."""

import torch

from gpsd_dist.metrics import recorder
from tests.helpers import distributed


def _rank_records(rank, world_size, folder):
    recorded = recorder.Recorder(folder, rank)
    for name, value in (("b/max", 10.0 - rank), ("a/sum", rank + 1.0))[:: 1 - 2 * rank]:  # another order per rank
        recorded.record(name, value, reduce=name[2:])
    recorded.record("train/loss", torch.tensor(6.0 * rank))
    recorded.record("c/last", float(rank), reduce="last")
    metrics = recorded.log(1, 0)
    recorded.record("only/rank_0" if rank == 0 else "only/rank_1", 1.0)
    try:
        recorded.log(2, 0)
    except RuntimeError as error:
        return metrics, str(error)


def test_ranks_are_reduced_together_and_different_names_are_an_error(tmp_path):
    for metrics, error in distributed.run_distributed(_rank_records, 2, tmp_path, tmp_path / "run"):
        assert metrics == {"b/max": 10.0, "a/sum": 3.0, "train/loss": 3.0, "c/last": 0.0}
        assert "ranks [1] recorded other metrics than rank 0" in error
    assert len((tmp_path / "run" / recorder.JSONL_NAME).read_text().splitlines()) == 1  # rank 0 wrote, once
