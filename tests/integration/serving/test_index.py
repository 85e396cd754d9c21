"""An index finds what `evaluate` ranks: the same hit rates to the last digit, from raw histories to raw items."""

import contextlib
import hashlib
import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpsd_dist.assembly import assemble
from gpsd_dist.checkpoint.loading import load_tensors
from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.export.__main__ import main as verify
from gpsd_dist.export.exporter import read_source
from gpsd_dist.export.raw_requests import _UNKNOWN as UNKNOWN
from gpsd_dist.export.raw_requests import RawRequests
from gpsd_dist.features import id_of
from gpsd_dist.index.__main__ import main
from gpsd_dist.metrics.ranking import HR_CUTS
from gpsd_dist.model.heads import unit
from gpsd_dist.schema import read_manifest
from gpsd_dist.serving import retriever as retrieving
from gpsd_dist.serving.artefact import ArtefactError, sum_of
from gpsd_dist.serving.retriever import load
from gpsd_dist.serving.scorer import load as load_scorer
from gpsd_dist.trained_run import evaluate_checkpoint
from tests.helpers import synthetic
from tests.integration.tiny_data import tiny_run, train_runs, write_tiny_data
from tests.integration.unbounded_data import write_unbounded_data

pytestmark = pytest.mark.timeout(420)
NUM_ITEMS = 700
TOWERS = ("transformer", "hstu", "sasrec")


@contextlib.contextmanager
def bags_of_the_pipeline():
    """Writes bags as the pipeline does: in order, and the unknown id instead of nothing."""
    original = synthetic._bag
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_bag", lambda *arguments: sorted(original(*arguments)) or [1])
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_rank):
    """Data, a pretrained run and index of each tower, and the rows of `valid` as raw requests."""
    root = tmp_path_factory.mktemp("index")
    with bags_of_the_pipeline():
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


def hit_rates(retriever, rows: list[dict], requests: list[dict], num_items: int) -> tuple[int, dict[int, float]]:
    """Searches for every positive of some rows by their raw requests: how many there are, and HR@K.

    Items that share a hashed row have one place, as the row has in `evaluate`.
    """
    item, ranks = retriever.manifest.feature("item"), []
    for row, request in zip(rows, requests, strict=True):
        [tokens] = retriever.reader.batches(retriever.reader.from_json([request]), 1)
        for value, label in zip(row["candidate.item"], row["label.click"], strict=True):
            if label == 1:
                target_1 = retriever.reader.served(item, np.array([value]))
                [found], _ = retriever.search_tokens(tokens, len(retriever.raw_ids), target_1)
                found = found[found >= 0]
                in_order = [*dict.fromkeys(found if retriever._row_V is None else retriever._row_V[found - 2])]
                ranks.append(in_order.index(target_1[0]) + 1 if target_1[0] in in_order else num_items)
    return len(ranks), {cut: float(np.mean(np.array(ranks) <= cut)) for cut in HR_CUTS if cut < num_items / 2}


@pytest.mark.equivalence
@pytest.mark.parametrize("name", TOWERS)
def test_hit_rates_are_those_of_evaluate(root, name, one_rank):
    expected = evaluate_checkpoint(root / name, None, "valid", one_rank)["next_item"]
    rows = pq.read_table(root / "data/valid/part-00000.parquet").to_pylist()
    requests = pq.read_table(root / "raw.parquet").to_pylist()
    count, found = hit_rates(load(root / f"a_{name}"), rows, requests, NUM_ITEMS)
    assert count == expected["rows"] > 10
    assert found == {cut: expected[f"hr@{cut}"] for cut in found} and len(set(found.values())) > 2


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


def raw_id(index: int) -> str:
    return f"raw {index}"


@pytest.fixture(scope="module", params=["hashed", "managed"])
def unbounded(request, tmp_path_factory, one_rank):
    """A pretrained run whose items have no vocabulary, and a file of raw ids: all of the log, and two new ones."""
    folder = tmp_path_factory.mktemp(request.param)

    def convert(index: int) -> int:
        return index if index < 2 else int(id_of(pa.array([raw_id(index)]))[0])

    tables = {"item": (request.param, 32), "tag": ("hashed", 14)}
    with bags_of_the_pipeline():
        manifest = write_unbounded_data(folder / "data", tables, convert)
    train_runs(0, 1, [tiny_run("pretrain", folder / "data", folder / "run", train={"max_steps": 9})])
    ids = [raw_id(index) for index in range(2, 61)]
    pq.write_table(pa.table({"item_id": [*ids, "new one", " new two ", None, ids[0]]}), folder / "items.parquet")
    return request.param, folder, manifest, ids


def build_index(folder, *options) -> int:
    run, data, out = (str(folder / name) for name in ("run", "data", "index"))
    return main(["build", "--checkpoint", run, "--data", data, "--out", out, *map(str, options)])


def test_items_without_a_vocabulary_are_searched_by_the_raw_ids_of_a_file(unbounded, capsys):
    kind, folder, manifest, ids = unbounded
    assert build_index(folder, "--items", folder / "items.parquet") == 0
    retriever = load(folder / "index")
    rows = {}
    for raw in [*ids, "new one", "new two"]:
        feature = manifest.feature("item")
        number = retriever.reader.encode(feature, pa.array([raw]))
        rows[raw] = int(retriever.reader.served(feature, number)[0])
    known = {raw: row for raw, row in rows.items() if row >= 2}
    assert sorted(retriever.raw_ids.to_pylist()) == sorted(known)  # a new id has a row where it is hashed
    assert ("new one" in known) == (kind == "hashed") and len(set(known.values())) > 10
    table = retriever._tables["item"]
    vector = {raw: unit(table.rows(np.array([row])))[0].numpy() for raw, row in known.items()}
    seen = ["raw 5", "raw 9", "raw 30"]
    request = {"user_id": "u", "request_time_s": 10**6, "history.time_s": [1, 2, 3], "history.item": seen}
    others = retriever.artefact.read_json("examples.json")["requests"][0]
    request |= {name: None for name in others if name not in request}
    [found] = retriever.search([request], 100)
    [user] = retriever.encode(retriever.reader(retriever.reader.from_json([request])))
    expected = {raw for raw, row in known.items() if row not in {rows[item] for item in seen}}
    assert set(found.item_ids) == expected
    np.testing.assert_allclose(found.scores, [user @ vector[raw] for raw in found.item_ids], atol=1e-6)
    assert found.scores == sorted(found.scores, reverse=True)


@pytest.mark.equivalence
def test_hit_rates_without_a_vocabulary_are_those_of_evaluate(unbounded, one_rank):
    """Requests have the raw ids that the log had; the file of items names one or more for every row that competes."""
    _, folder, manifest, ids = unbounded
    pq.write_table(pa.table({"item_id": [*ids, *(f"new {n}" for n in range(400))]}), folder / "all.parquet")
    assert build_index(folder, "--items", folder / "all.parquet") == 0
    expected = evaluate_checkpoint(folder / "run", None, "valid", one_rank)["next_item"]
    rows = pq.read_table(folder / "data/valid/part-00000.parquet")
    # A number stands for the raw id there. What is not known would have a row of its own where ids are hashed.
    raw_of = {f"id {id_of(pa.array([raw]))[0]}": raw for raw in ids} | {UNKNOWN: None}

    def as_logged(value):
        if isinstance(value, dict):
            return {name: as_logged(entry) for name, entry in value.items()}
        return [as_logged(entry) for entry in value] if isinstance(value, list) else raw_of.get(value, value)

    requests = as_logged(RawRequests(folder / "data", manifest)(rows).to_pylist())
    count, found = hit_rates(load(folder / "index"), rows.to_pylist(), requests, manifest.table("item").num_rows)
    assert count == expected["rows"] > 10
    assert found == {cut: expected[f"hr@{cut}"] for cut in found} and len(set(found.values())) > 1


def test_items_of_a_vocabulary_may_be_restricted_to_some(root, tmp_path):
    ids = load(root / "a_hstu").raw_ids.to_pylist()
    pq.write_table(pa.table({"item_id": [ids[7], ids[3], "unknown"]}), tmp_path / "on_sale.parquet")
    for name in ("data", "run"):
        (tmp_path / name).symlink_to(root / ("data" if name == "data" else "hstu"))
    assert build_index(tmp_path, "--items", tmp_path / "on_sale.parquet") == 0
    assert load(tmp_path / "index").raw_ids.to_pylist() == [ids[3], ids[7]]


def test_runs_that_cannot_be_indexed(root, unbounded, tmp_path, capsys):
    _, folder, _, _ = unbounded
    assert build_index(folder) == 2
    assert "give --items, a Parquet file with a column item_id" in capsys.readouterr().err
    pq.write_table(pa.table({"sku": ["a"]}), tmp_path / "no_ids.parquet")
    assert build_index(folder, "--items", tmp_path / "no_ids.parquet") == 2
    assert "expected a Parquet file with a column item_id" in capsys.readouterr().err
    train_runs(0, 1, [tiny_run("finetune", root / "data", tmp_path / "run", train={"max_steps": 1})])
    (tmp_path / "data").symlink_to(root / "data")
    assert build_index(tmp_path) == 2
    assert "does not rank all items; index a pretrained run" in capsys.readouterr().err
    assert not (tmp_path / "index/current.json").exists()


def _forged(artefact, change) -> None:
    """Changes a result that comes with the current version, with all hashes that belong to it."""
    folder = load(artefact, verify=False).artefact.folder
    expected = load_file(folder / "expected.safetensors")
    change(expected)
    description = json.loads((folder / "artefact.json").read_text())
    save_file(expected, folder / "expected.safetensors")
    made = sum_of(folder / "expected.safetensors")
    description["files"]["expected.safetensors"] = {"bytes": made.num_bytes, "sha256": made.sha256}
    content = json.dumps(description).encode()
    digest = hashlib.sha256(content).hexdigest()
    (folder / "artefact.json").write_bytes(content)
    version = f"{folder.name.rsplit('-', 1)[0]}-{digest[:12]}"
    folder.rename(folder.parent / version)
    (artefact / "current.json").write_text(json.dumps({"version": version, "sha256": digest}))


def _add(name: str, amount: float):
    return lambda expected: expected[name].flatten()[:1].add_(amount)


@pytest.mark.parametrize("name", TOWERS)
def test_verify_proves_vectors_and_items(root, name, tmp_path, capsys):
    artefact = tmp_path / "index"
    shutil.copytree(root / f"a_{name}", artefact)
    assert verify(["verify", str(artefact)]) == 0
    assert "examples differ by" in capsys.readouterr().out
    expected = load_file(load(artefact).artefact.path("expected.safetensors"))
    assert expected["result/vector"].abs().max() > 0.1 and (expected["row"][:, 0] > 1).sum() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add("result/vector", 1e-3), "get values of 'vector' that differ by 0.001"),
        (_add("result/score", 1e-3), "get values of 'score' that differ"),
        (_add("row", 1), "get values of 'score of row' that differ"),
        (_add("history_time_s", 1), "become other tokens here (history_time_s)"),
    ],
)
def test_verify_finds_what_is_found_otherwise(root, change, message, tmp_path, capsys):
    artefact = tmp_path / "index"
    shutil.copytree(root / "a_hstu", artefact)
    _forged(artefact, change)
    assert verify(["verify", str(artefact)]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ArtefactError):
        load(artefact)


def test_the_examples_are_those_of_evaluate(root, one_rank):
    """The vectors that come with an index are those that the training code computes of the same rows of `valid`."""
    expected = load_file(load(root / "a_hstu").artefact.path("expected.safetensors"))["result/vector"]
    source = read_source(root / "hstu", str(root / "data"), with_candidates=False)
    components = assemble(source.run, source.manifest, one_rank)
    load_tensors(source.checkpoint, components.weights())
    components.model.eval()
    found = []
    for (host_batch,) in evaluation_loader(source.run, source.manifest, components.lookup_names, "valid", one_rank):
        (batch,) = components.ids.assign((host_batch,))
        with torch.no_grad():
            hidden_TE = unit(components.model(components.tables(batch.lookup), batch).hidden_TE)
        ends = batch.packing.history_offsets
        vectors = torch.zeros(len(ends) - 1, hidden_TE.shape[1])
        vectors[ends.diff() > 0] = hidden_TE[ends[1:][ends.diff() > 0] - 1]
        found.append(vectors[torch.argsort(batch.source_row_B)])
    found_BE = torch.cat(found)
    assert len(found_BE) <= len(expected) and (found_BE - expected[: len(found_BE)]).abs().max() <= 1e-5


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
