"""An index finds what `evaluate` ranks: the same hit rates to the last digit, from raw histories to raw items."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gpsd_dist.evaluate import evaluate_checkpoint
from gpsd_dist.export.raw_requests import RawRequests
from gpsd_dist.index.__main__ import main
from gpsd_dist.metrics.ranking import HR_CUTS
from gpsd_dist.schema import read_manifest
from gpsd_dist.serving import retriever as retrieving
from gpsd_dist.serving.artefact import ArtefactError
from gpsd_dist.serving.retriever import load
from gpsd_dist.serving.scorer import load as load_scorer
from tests.helpers import synthetic
from tests.integration.tiny_data import tiny_run, train_runs, write_tiny_data
from tests.integration.unbounded_data import write_unbounded_data

pytestmark = pytest.mark.timeout(420)
NUM_ITEMS = 700
TOWERS = ("transformer", "hstu", "sasrec")


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_rank):
    """Data, a pretrained run and index of each tower, and the rows of `valid` as raw requests."""
    root, original = tmp_path_factory.mktemp("index"), synthetic._bag
    with pytest.MonkeyPatch.context() as patch:  # bags as the pipeline writes them
        patch.setattr(synthetic, "_bag", lambda *arguments: sorted(original(*arguments)) or [1])
        write_tiny_data(root / "data", num_items=NUM_ITEMS)
    for name in TOWERS:
        train_runs(
            0, 1, [tiny_run("pretrain", root / "data", root / name, model={"name": name}, train={"max_steps": 9})]
        )
        command = [
            "build",
            "--checkpoint",
            str(root / name),
            "--data",
            str(root / "data"),
            "--out",
            str(root / f"a_{name}"),
        ]
        assert main(command) == 0
    rows = pq.read_table(root / "data/valid/part-00000.parquet")
    pq.write_table(RawRequests(root / "data", read_manifest(root / "data"))(rows), root / "raw.parquet")
    return root


@pytest.mark.equivalence
@pytest.mark.parametrize("name", TOWERS)
def test_hit_rates_are_those_of_evaluate(root, name, one_rank):
    expected = evaluate_checkpoint(root / name, None, "valid", one_rank)["next_item"]
    retriever = load(root / f"a_{name}")
    rows = pq.read_table(root / "data/valid/part-00000.parquet").to_pylist()
    requests = pq.read_table(root / "raw.parquet").to_pylist()
    ranks = []
    for row, request in zip(rows, requests, strict=True):
        [tokens] = retriever.reader.batches(retriever.reader.from_json([request]), 1)
        for target, label in zip(row["candidate.item"], row["label.click"], strict=True):
            if label == 1:
                [found], _ = retriever.search_tokens(tokens, NUM_ITEMS, np.array([target]))
                place = np.flatnonzero(found == target)
                ranks.append(place[0] + 1 if len(place) and target > 1 else NUM_ITEMS)
    assert len(ranks) == expected["rows"] > 10
    cuts = [cut for cut in HR_CUTS if cut < NUM_ITEMS / 2]
    assert {cut: np.mean(np.array(ranks) <= cut) for cut in cuts} == {cut: expected[f"hr@{cut}"] for cut in cuts}
    assert len({expected[f"hr@{cut}"] for cut in cuts}) > 2


def test_commands_write_raw_ids(root, tmp_path):
    artefact, raw = str(root / "a_hstu"), ["--requests", str(root / "raw.parquet")]
    assert main(["search", artefact, *raw, "--top", "20", "--out", str(tmp_path / "found")]) == 0
    assert main(["users", artefact, *raw, "--out", str(tmp_path / "users")]) == 0
    assert main(["items", artefact, "--out", str(tmp_path / "items")]) == 0
    found, users, items = (
        pq.read_table(tmp_path / name / "part-00000.parquet") for name in ("found", "users", "items")
    )
    requests = pq.read_table(root / "raw.parquet").to_pylist()
    assert len(items) == NUM_ITEMS - 2 and len(users) == len(requests)
    vector = {row["item_id"]: np.array(row["vector"]) for row in items.to_pylist()}
    answers = load(root / "a_hstu").search(requests, 20)
    assert any(answer.item_ids for answer in answers) and any(not request["history.item"] for request in requests)
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        rows = found.filter(pa.compute.equal(found["request"], number)).to_pylist()
        assert [row["item_id"] for row in rows] == answer.item_ids and [row["rank"] for row in rows] == [
            *range(1, len(rows) + 1)
        ]
        assert all(row["user_id"] == request["user_id"] for row in rows)
        assert len(rows) == (20 if request["history.item"] else 0)
        visible = [item for item, t in zip(request["history.item"], request["history.time_s"], strict=True)
                   if t is None or t < request["request_time_s"]][-10:]  # fmt: skip
        assert not set(answer.item_ids) & set(visible)
        user = np.array(users["vector"][number].as_py())
        np.testing.assert_allclose(answer.scores, [user @ vector[item] for item in answer.item_ids], atol=1e-6)
        assert answer.scores == sorted(answer.scores, reverse=True)
    assert set(found["version"].to_pylist()) == {load(root / "a_hstu").version}


class Rows:
    def __init__(self, vectors: torch.Tensor):
        self.vectors, self.num_rows = vectors, len(vectors)

    def rows(self, index: np.ndarray) -> torch.Tensor:
        return self.vectors[torch.from_numpy(index)]

    def block(self, first: int, stop: int) -> torch.Tensor:
        return self.vectors[first:stop]


@pytest.mark.parametrize(("block", "top"), itertools.product((7, 64, 1000), (1, 5, 90)))
def test_search_is_exact_in_blocks_and_among_equal_items(block, top, monkeypatch):
    monkeypatch.setattr(retrieving, "_BLOCK_ITEMS", block)
    generator = torch.Generator().manual_seed(block + top)
    vectors = torch.nn.functional.normalize(torch.randn(300, 16, generator=generator), dim=1)
    vectors[100:160] = vectors[50]  # more equal items than are preselected
    queries = torch.nn.functional.normalize(torch.cat([torch.randn(5, 16, generator=generator), vectors[50:51]]), dim=1)
    seen = [np.unique(np.random.default_rng(n).integers(1, 300, 20)) for n in range(6)]
    found, scores = retrieving._best(queries, Rows(vectors), seen, top)
    for number in range(6):
        score = (vectors.double() @ queries[number].double()).float().numpy()
        competing = [row for row in range(2, 300) if row not in seen[number]]
        expected = sorted(competing, key=lambda row: (-score[row], row))[:top]
        assert found[number].tolist() == expected
        assert scores[number].tolist() == score[expected].tolist()


def test_fewer_items_than_are_wanted():
    vectors = torch.eye(6)
    found, scores = retrieving._best(torch.ones(1, 6), Rows(vectors), [np.array([3, 5])], 4)
    assert found[0, :2].tolist() == [2, 4] and np.isneginf(scores[0, 2:]).all()


def test_runs_that_cannot_be_indexed(root, tmp_path, capsys):
    train_runs(0, 1, [tiny_run("finetune", root / "data", tmp_path / "ranker", train={"max_steps": 1})])
    write_unbounded_data(tmp_path / "hashed", {"item": ("hashed", 32), "tag": ("hashed", 14)})
    train_runs(0, 1, [tiny_run("pretrain", tmp_path / "hashed", tmp_path / "run", train={"max_steps": 1})])
    for run, data, message in (
        ("ranker", root / "data", "does not rank all items; index a pretrained run"),
        ("run", tmp_path / "hashed", "their raw ids are not kept"),
    ):
        command = [
            "build",
            "--checkpoint",
            str(tmp_path / run),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "artefact"),
        ]
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "artefact/current.json").exists()


def test_an_index_is_no_ranker_and_damage_is_found(root, tmp_path, capsys):
    with pytest.raises(ArtefactError):
        load_scorer(root / "a_sasrec")
    version = json.loads((root / "a_sasrec/current.json").read_text())["version"]
    vocabulary = root / "a_sasrec/versions" / version / "vocab/item.parquet"
    content = vocabulary.read_bytes()
    vocabulary.write_bytes(content[:-1] + b"x")
    try:
        command = [
            "search",
            str(root / "a_sasrec"),
            "--requests",
            str(root / "raw.parquet"),
            "--out",
            str(tmp_path / "o"),
        ]
        assert main(command) == 2
        assert "vocab/item.parquet is not what was written" in capsys.readouterr().err
    finally:
        vocabulary.write_bytes(content)
