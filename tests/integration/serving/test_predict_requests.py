"""`predict --artefact` scores raw requests as `predict --checkpoint` scores the split that they were made of."""

import dataclasses
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist.export.exporter import export, read_source
from gpsd_dist.export.raw_requests import RawRequests
from gpsd_dist.predict.__main__ import main
from gpsd_dist.predict.split import predict_split
from gpsd_dist.schema import read_manifest
from gpsd_dist.serving.request_log import RequestLog
from gpsd_dist.serving.scorer import load
from gpsd_dist.trained_run import load_trained
from tests.helpers import synthetic
from tests.integration.tiny_data import tiny_run, train_runs, write_tiny_data

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_rank):
    """A run, its artefact, and the rows of `valid` as raw requests."""
    root, original = tmp_path_factory.mktemp("predict"), synthetic._bag
    with pytest.MonkeyPatch.context() as patch:  # bags as the pipeline writes them
        patch.setattr(synthetic, "_bag", lambda *arguments: sorted(original(*arguments)) or [1])
        write_tiny_data(root / "data")
    train_runs(0, 1, [tiny_run("finetune", root / "data", root / "run", train={"max_steps": 4})])
    export(read_source(root / "run", str(root / "data")), root / "artefact")
    rows = pq.read_table(root / "data/valid/part-00000.parquet")
    requests = RawRequests(root / "data", read_manifest(root / "data"))(rows)
    pq.write_table(requests, root / "raw.parquet")
    return root


def predict(root: pathlib.Path, requests: pathlib.Path, out: pathlib.Path) -> tuple[pa.Table, dict]:
    assert main(["--artefact", str(root / "artefact"), "--requests", str(requests), "--out", str(out)]) == 0
    summary = json.loads((out / "predictions.json").read_text())
    return pa.concat_tables([pq.read_table(out / name) for name in summary["files"]]), summary


@pytest.mark.equivalence
def test_scores_are_those_of_the_checkpoint(root, tmp_path, one_rank):
    trained = load_trained(root / "run", str(root / "data"), "valid", one_rank)
    predict_split(trained, "valid", tmp_path / "split", one_rank)
    expected = pq.read_table(tmp_path / "split/part-00000.parquet")
    found, summary = predict(root, root / "raw.parquet", tmp_path / "requests")
    assert summary["candidates"] == len(found) == len(expected)
    for name in ("user_id", "request", "request_time_s"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    for given, known in zip(found["item_id"].to_pylist(), expected["item_id"].to_pylist(), strict=True):
        assert known is None or given == known
    numbers = [name for name in expected.column_names if name.split(".")[-1] in ("logit", "probability", "product")]
    assert len(numbers) == 5 and numbers == found.column_names[6:]
    for name in numbers:
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), atol=1e-5)
    assert set(found["version"].to_pylist()) == {summary["version"]}


def test_logged_requests_are_scored_again_and_compared(root, tmp_path):
    scorer = load(root / "artefact")
    sent = pq.read_table(root / "raw.parquet").slice(0, 9).to_pylist()
    log = RequestLog(tmp_path / "log", 1.0, 7, True, scorer.reader.from_json, print)
    log.add(sent[:4], scorer.score(sent[:4]))
    others = {task: {"logit": [9.0] * len(sent[8]["candidate.item"])} for task in ("click", "buy")}
    answers = scorer.score(sent[4:])
    answers[-1] = dataclasses.replace(answers[-1], counters_age_s=5, tasks=others)
    log.add(sent[4:], answers)
    log.close()
    found, summary = predict(root, tmp_path / "log", tmp_path / "out")
    assert summary["requests"] == 9 and set(summary["largest_difference"]) == {"click", "buy"}
    assert max(summary["largest_difference"].values()) <= 1e-5
    assert found["user_id"][0].as_py() not in (None, sent[0]["user_id"])
    assert found["counters_age_s"].null_count == len(found)
    (path,) = (tmp_path / "log").glob("*.parquet")
    pq.write_table(pq.read_table(path).drop_columns("counters_age_s"), path)  # a log of before
    assert max(predict(root, path, tmp_path / "before")[1]["largest_difference"].values()) > 1


def test_mistakes_name_the_file_and_the_request(root, tmp_path, capsys):
    rows = pq.read_table(root / "raw.parquet").to_pylist() * 6
    rows[70] = rows[70] | {"request_time_s": 10**13}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw.parquet")
    (tmp_path / "other").mkdir()
    (tmp_path / "no.parquet").write_text("no")
    arguments = ["--artefact", str(root / "artefact"), "--out", str(tmp_path / "out")]
    for requests, message in (
        ("raw.parquet", "raw.parquet: request 70, 'request_time_s': found 10000000000000.0"),
        ("other", "has no .parquet file"),
        ("no.parquet", "cannot be read as Parquet"),
    ):
        assert main([*arguments, "--requests", str(tmp_path / requests)]) == 2
        assert message in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(SystemExit):
        main([*arguments])
