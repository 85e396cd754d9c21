"""Exported models score as `evaluate` does: every tower, every kind of feature and id, several tasks, frozen tables."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gpsd_dist.assembly import assemble
from gpsd_dist.checkpoint.loading import load_tensors
from gpsd_dist.config import FinetuneConfig
from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.config.model import MODELS
from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.export import exporter, gates
from gpsd_dist.export.__main__ import main as export_command
from gpsd_dist.export.exporter import export, read_source
from gpsd_dist.export.gates import managed
from gpsd_dist.export.options import Options
from gpsd_dist.export.parquet_tokens import read_split
from gpsd_dist.export.raw_requests import RawRequests, read_requests
from gpsd_dist.index.__main__ import main as index_command
from gpsd_dist.serving.artefact import ArtefactError, open_version
from gpsd_dist.serving.batches import taken
from gpsd_dist.serving.counters import POINTER_NAME, Counters
from gpsd_dist.serving.examples import largest_distance, replay
from gpsd_dist.serving.scorer import load
from tests.helpers import forked, synthetic
from tests.helpers.commands import environment
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import read_checkpoint, tiny_run, train_runs, write_tiny_data
from tests.integration.unbounded_data import write_unbounded_data

pytestmark = pytest.mark.timeout(420)
TOLERANCE = 1e-5  # SERVING's goal


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The tiny data with bags as the pipeline writes them: in order, and the unknown id instead of nothing."""
    folder, original = tmp_path_factory.mktemp("data"), synthetic._bag
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_bag", lambda *arguments: sorted(original(*arguments)) or [1])
        write_tiny_data(folder)
    return folder


def evaluated(source, runtime) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What `evaluate` computes for each batch of `valid`: task -> logits [C], and the order of its rows."""
    components = assemble(source.run, source.manifest, runtime)
    load_tensors(source.checkpoint, components.weights())
    components.model.eval()
    found = []
    for (batch,) in evaluation_loader(source.run, source.manifest, components.lookup_names, "valid", runtime):
        (batch,) = components.ids.assign((batch,))
        with torch.no_grad():
            found.append((components.model(components.tables(batch.lookup), batch), batch.source_row_B))
    return found


def largest_difference(source, artefact, runtime, rows=None, **options) -> float:
    """Of all logits of `valid`, in batches of four requests, and with each request alone."""
    scorer, differences = load(artefact, **options), []
    tokens = read_split(source.run, source.manifest, "valid", rows or {}, rows_at_once=4)
    for (expected, _), labelled in zip(evaluated(source, runtime), tokens, strict=True):
        together = scorer.score_tokens(labelled.tokens)
        alone = [scorer.score_tokens(taken(labelled.tokens, np.array([i]))) for i in range(len(labelled.tokens))]
        for task, logits in expected.items():
            differences.append(np.abs(together[task] - logits.numpy()).max(initial=0))
            joined = np.concatenate([part[task] for part in alone])
            differences.append(np.abs(joined - logits.numpy()).max(initial=0))
    assert len(differences) == 2 * 2 * 6  # tasks, ways, batches
    return float(max(differences))


def raw_difference(source, artefact, runtime) -> float:
    """Of all logits of `valid` where rows are turned into raw requests, as JSON, and those are scored."""
    scorer, differences = load(artefact), []
    rows = pq.read_table(pathlib.Path(source.run.data_dir) / "valid/part-00000.parquet")
    requests = RawRequests(pathlib.Path(source.run.data_dir), source.manifest)(rows).to_pylist()
    answers = scorer.score(json.loads(json.dumps(requests)))
    first = 0
    for logits, order in evaluated(source, runtime):
        for task, logit_C in logits.items():
            found = np.concatenate([answers[first + i].tasks[task]["logit"] for i in order])
            differences.append(np.abs(found - logit_C.numpy()).max(initial=0))
        first += len(order)
    assert first == len(requests)
    return float(max(differences))


@pytest.mark.parametrize("name", MODELS)
def test_every_tower_scores_as_evaluated(name, data_dir, tmp_path, one_rank):
    model = {"name": name, "matches": True, "bag_matches": True}
    run = tiny_run("finetune", data_dir, tmp_path / "run", model=model, train={"max_steps": 4})
    train_runs(0, 1, [run])
    source = read_source(tmp_path / "run", str(data_dir))
    export(source, tmp_path / "artefact")
    assert largest_difference(source, tmp_path / "artefact", one_rank) <= TOLERANCE
    assert raw_difference(source, tmp_path / "artefact", one_rank) <= TOLERANCE


@pytest.mark.parametrize(("name", "engine"), [("transformer", "eager"), ("transformer", "onnx"), ("deepfm", "eager")])
def test_a_residual_on_another_model_is_served_as_evaluated(name, engine, data_dir, tmp_path, one_rank):
    if engine == "onnx":
        pytest.importorskip("onnxscript")
    parts = {"model": {"name": name}, "train": {"max_steps": 4}, "finetune": {"offset": "discount"}}
    train_runs(0, 1, [tiny_run("finetune", data_dir, tmp_path / "run", **parts)])
    source = read_source(tmp_path / "run", str(data_dir))
    export(source, tmp_path / "artefact", Options(engine=engine))
    assert largest_difference(source, tmp_path / "artefact", one_rank) <= TOLERANCE
    assert raw_difference(source, tmp_path / "artefact", one_rank) <= TOLERANCE


@pytest.mark.parametrize("kind", ["managed", "hashed"])
def test_tables_without_a_vocabulary_are_scored_alike(kind, tmp_path, one_rank):
    tables = {"item": (kind, 32), "tag": (kind, 14 if kind == "managed" else 25)}
    write_unbounded_data(tmp_path / "data", tables)
    ids = IdsConfig(admission_threshold=2, eviction="lfu")
    train_runs(0, 1, [tiny_run("finetune", tmp_path / "data", tmp_path / "run", ids=ids, train={"max_steps": 6})])
    source = read_source(tmp_path / "run", str(tmp_path / "data"))
    export(source, tmp_path / "artefact")
    rows = managed(load(tmp_path / "artefact"))
    assert set(rows) == (set(tables) if kind == "managed" else set())
    assert largest_difference(source, tmp_path / "artefact", one_rank, rows) <= TOLERANCE


@pytest.mark.parametrize("frozen_dtype", ["fp32", "fp16"])
def test_a_frozen_table_is_stored_once_and_esmm_gives_products(frozen_dtype, data_dir, tmp_path, one_rank):
    pretrained = tiny_run("pretrain", data_dir, tmp_path / "pretrain", train={"max_steps": 4})
    runs = [
        tiny_run("finetune", data_dir, tmp_path / f"run{seed}", "ST_SF", tmp_path / "pretrain", seed=seed,
                 finetune=FinetuneConfig(esmm=True), tables={"frozen_dtype": frozen_dtype}, train={"max_steps": 3})
        for seed in (0, 1)
    ]  # fmt: skip
    train_runs(0, 1, [pretrained, *runs])
    sources = [read_source(run.output_dir, str(data_dir)) for run in runs]
    versions = [export(source, tmp_path / "artefact") for source in sources]
    first, second = (load(tmp_path / "artefact/versions" / version) for version in versions)
    assert first.tables["item"].dtype == frozen_dtype
    entries = [scorer.metadata["tables"]["item"]["blobs"] for scorer in (first, second)]
    assert entries[0] == entries[1] and len(entries[0]) == 1
    assert len(list((tmp_path / "artefact/blobs").iterdir())) == 3  # the frozen table, and two of tags
    assert largest_difference(sources[1], tmp_path / "artefact", one_rank) <= TOLERANCE


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, data_dir, one_rank):
    folder = tmp_path_factory.mktemp("finetuned")
    train_runs(0, 1, [tiny_run("finetune", data_dir, folder / f"s{seed}", seed=seed) for seed in (0, 1)])
    return folder


@pytest.fixture(scope="module")
def artefact(finetuned, data_dir):
    export(read_source(finetuned / "s0", str(data_dir)), finetuned / "artefact")
    return finetuned / "artefact"


def command(*arguments) -> subprocess.CompletedProcess:
    return forked.run("gpsd_dist.export", *arguments)


def test_the_command_exports_verifies_and_finds_damage(finetuned, data_dir, tmp_path):
    out = tmp_path / "ctr"
    arguments = ("--checkpoint", finetuned / "s0", "--data", data_dir, "--out", out)
    started = [sys.executable, "-W", "ignore", "-m", "gpsd_dist.export", *map(str, arguments)]
    made = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    checked = command("verify", out)
    assert checked.returncode == 0 and "all as written; examples differ by" in checked.stdout, checked.stderr
    code = (
        "import sys; from gpsd_dist.export.__main__ import main; main(sys.argv[1:]); "
        "print({'torchrec', 'torch._dynamo'} & set(sys.modules))"
    )
    program = [sys.executable, "-c", code, "verify", out]
    lean = environment() | {"TORCHDYNAMO_DISABLE": "1"}  # as python -m gpsd_dist.serve sets it
    whole = subprocess.run(program, env=lean, capture_output=True, text=True, timeout=120)
    assert whole.stdout.splitlines()[-1] == "set()", whole.stdout + whole.stderr
    path = open_version(out).folder / "tower.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    damaged = command("verify", out)
    assert damaged.returncode == 1 and "tower.safetensors is not what was written" in damaged.stderr
    mistake = command("--checkpoint", tmp_path, "--data", data_dir, "--out", out)
    assert mistake.returncode == 2 and "neither a run folder" in mistake.stderr


def test_a_real_server_answers_as_evaluated(finetuned, artefact, data_dir):
    source = ("--checkpoint", finetuned / "s0", "--data", data_dir)
    same = command("parity", artefact, *source)
    assert same.returncode == 0, same.stderr
    assert "served = evaluated: 13 raw requests of test over HTTP, " in same.stdout
    other = command("parity", artefact, "--checkpoint", finetuned / "s1", "--data", data_dir, "--requests", 5)
    assert other.returncode == 1 and "served is not evaluated: 5 raw requests" in other.stdout


def test_the_model_of_pretraining_is_refused(data_dir, tmp_path, one_rank):
    train_runs(0, 1, [tiny_run("pretrain", data_dir, tmp_path / "run", train={"max_steps": 1})])
    with pytest.raises(ValueError, match="stage 'pretrain', which scores no candidates"):
        read_source(tmp_path / "run", str(data_dir))


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_smaller_tables_are_measured_and_refused_where_they_lose(finetuned, data_dir, tmp_path, monkeypatch, dtype):
    source = read_source(finetuned / "s0", str(data_dir))
    monkeypatch.setattr(exporter, "_counters", lambda *_: Counters({"id": np.zeros(0, np.int64)}, as_of_s=1))
    monkeypatch.setattr(gates, "MAX_LOSS", {"fp16": 1.0, "int8": 1.0})
    export(source, tmp_path / "ctr", Options(dtype))
    scorer, exact = load(tmp_path / "ctr"), load_exact(source, tmp_path)
    assert {table.dtype for table in scorer.tables.values()} == {dtype}
    assert len(list((tmp_path / "ctr/blobs").iterdir())) == 2  # those of the comparison are gone
    tokens = next(read_split(source.run, source.manifest, "valid", {})).tokens
    difference = np.abs(scorer.score_tokens(tokens)["click"] - exact.score_tokens(tokens)["click"]).max()
    assert 0 < difference < 0.02
    monkeypatch.setattr(gates, "MAX_LOSS", {"fp16": -1.0, "int8": -1.0})
    with pytest.raises(ValueError, match=rf"{dtype} tables change the AUC on valid .*--accept_loss"):
        export(source, tmp_path / "refused", Options(dtype))
    assert not (tmp_path / "refused" / POINTER_NAME).exists()  # counters of before would be served on
    assert not list((tmp_path / "refused/versions").iterdir())
    export(source, tmp_path / "refused", Options(dtype, accept_loss=True))
    assert (tmp_path / "refused" / POINTER_NAME).is_file()


def load_exact(source, folder):
    export(source, folder / "exact")
    return load(folder / "exact")


def test_a_worse_version_does_not_replace_the_current_one(finetuned, data_dir, tmp_path):
    first, second = (read_source(finetuned / name, str(data_dir)) for name in ("s0", "s1"))
    export(first, tmp_path / "ctr")
    current = load(tmp_path / "ctr").version
    second_folder = tmp_path / "other/versions" / export(second, tmp_path / "other")
    scorers = load(tmp_path / "ctr"), load(second_folder)
    rows = list(read_split(first.run, first.manifest, "test", {}))
    scores = [gates.aucs(scorer, rows)["click"] for scorer in scorers]
    worse, better = (second, first) if scores[1] < scores[0] else (first, second)
    assert scores[0] != scores[1]
    export(better, tmp_path / "ctr", Options(replaces_current=True))
    with pytest.raises(ValueError, match=r"AUC of click on .*which stays: train anew, or export with --accept_worse"):
        export(worse, tmp_path / "ctr", Options(replaces_current=True))
    assert load(tmp_path / "ctr").version != current
    best = load(tmp_path / "ctr").version
    export(worse, tmp_path / "ctr", Options(replaces_current=True, accept_worse=True))
    assert load(tmp_path / "ctr").version != best


def test_the_current_version_reads_raw_requests_of_other_data(artefact, finetuned, data_dir):
    """As when the vocabulary has grown since: by raw ids, not by rows."""
    source, scorer = read_source(finetuned / "s0", str(data_dir)), load(artefact)
    parts = [read_split(source.run, source.manifest, "test", {}),
             read_requests(source.run, source.manifest, "test", scorer.reader)]  # fmt: skip
    by_rows, by_ids = (gates.aucs(scorer, part) for part in parts)
    assert by_rows == pytest.approx(by_ids, abs=0) and 0 < by_rows["click"] < 1


def test_statistics_are_those_of_train(artefact, data_dir):
    found = open_version(artefact).read_json("statistics.json")
    table = pq.read_table(data_dir / "train/part-00000.parquet")
    lengths = [min(length, 10) for length in table["history_length"].to_pylist()]
    assert found["requests"] == 46 and found["means"]["history_length"] == pytest.approx(np.mean(lengths))
    items = [i for name in ("history.item", "candidate.item") for row in table[name].to_pylist() for i in row[-10:]]
    assert found["means"]["unknown item"] == pytest.approx(np.mean([item == 1 for item in items]))
    assert found["quantiles"]["history_length"]["1.0"] == max(lengths)
    assert load(artefact).reference == found["means"]
    assert 0 < found["means"]["probability click"] < 1


def test_tables_that_two_ranks_saved_in_shards_are_whole(data_dir, tmp_path):
    sharding = {"item": "row_wise", "tag": "column_wise"}
    run = tiny_run("finetune", data_dir, tmp_path / "run", tables={"sharding": sharding}, train={"max_steps": 2})
    run_distributed(train_runs, 2, tmp_path, [run], timeout_s=300)
    source = read_source(tmp_path / "run", str(data_dir))
    export(source, tmp_path / "ctr")
    saved, scorer = read_checkpoint(source.checkpoint), load(tmp_path / "ctr")
    for name, table in scorer.tables.items():
        assert torch.equal(table.rows(np.arange(table.num_rows)), saved[f"table.{name}"][:, : table.width])


def test_products_of_conditional_tasks(artefact):
    scorer = load(artefact)
    requests = scorer.artefact.read_json("examples.json")["requests"]
    assert len(requests) >= 30 and max(len(r["candidate.item"]) for r in requests) == scorer.limits.max_candidates
    for answer in scorer.score(requests):
        click, buy = answer.tasks["click"], answer.tasks["buy"]
        assert "product" not in click
        assert buy["product"] == pytest.approx(np.multiply(click["probability"], buy["probability"]))
    unknown = [answer.unknown_ids for answer in scorer.score(requests)]
    assert max(answer.dropped_events for answer in scorer.score(requests)) == 1 and max(unknown) > 1


def test_other_examples_are_not_served(artefact, tmp_path):
    shutil.copytree(artefact, tmp_path / "ctr")
    scorer = load(tmp_path / "ctr")
    with torch.no_grad():
        weight = scorer.model.heads.mlps["click"][-1].bias
        scorer.model.heads.mlps["click"][-1].bias = torch.nn.Parameter(weight + 1e-4)
    with pytest.raises(ArtefactError, match=r"logits of task 'click' that differ by 0\.0001 here"):
        replay(scorer)
    scorer = load(tmp_path / "ctr")
    object.__setattr__(scorer.reader.limits, "max_candidates", 5)
    with pytest.raises(ArtefactError, match="not read any more: request"):
        replay(scorer)


def test_rounding_may_grow_with_a_logit_but_not_beyond():
    expected = np.float32([0.5, -30.0])
    assert largest_distance(expected + np.float32([0, 9e-5]), expected) < 1e-5
    assert largest_distance(expected + np.float32([9e-5, 0]), expected) > 1e-5
    assert np.isnan(largest_distance(expected * np.float32(np.nan), expected))
    assert largest_distance(expected[:0], expected[:0]) == 0


def test_mistakes_in_the_command_are_named(artefact, finetuned, data_dir, tmp_path, capsys):
    assert export_command(["publish", "artefacts/ctr"]) == 2
    assert "there is no 'publish': name one of verify, use, parity" in capsys.readouterr().err
    new = ["--checkpoint", str(finetuned), "--data", str(data_dir), "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit):
        export_command([*new, "--replaces", "current"])
    assert "has no current version to compare with; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert index_command(["search", str(artefact), "--requests", "raw.parquet", "--out", str(tmp_path / "found")]) == 2
    assert "holds no item vectors; searched is what" in capsys.readouterr().err
