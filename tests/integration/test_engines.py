"""The Transformer in two parts (torch, ONNX, cached histories) scores as it does in one."""

import numpy as np
import pytest
import torch

from gpsd_dist.export.exporter import export, read_source
from gpsd_dist.export.source import Options
from gpsd_dist.serving.artefact import ArtefactError, open_version
from gpsd_dist.serving.history_cache import MAX_NEW_EVENTS, Encoded, HistoryCache, prefix_hash
from gpsd_dist.serving.scorer import load
from tests.integration.test_export import data_dir as data_dir
from tests.integration.test_export import evaluated, largest_difference
from tests.integration.tiny_data import tiny_run, train_runs

pytestmark = pytest.mark.timeout(600)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory, data_dir, one_rank):
    """Two layers, with weights large enough for an error to show; projected, because the tables are narrower."""
    folder = tmp_path_factory.mktemp("engines")
    model = {"layers": 2, "width": 24, "heads": 2, "init_std": 0.3}
    train_runs(0, 1, [tiny_run("finetune", data_dir, folder / "run", model=model, train={"max_steps": 8})])
    return read_source(folder / "run", str(data_dir))


@pytest.fixture(scope="module")
def artefact(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "ctr"
    export(source, folder, Options(engine="onnx"))
    return folder


def test_logits_are_not_all_alike(source, one_rank):
    logits = torch.cat([logits["click"] for logits, _ in evaluated(source, one_rank)])
    assert logits.std() > 0.1


@pytest.mark.parametrize("cache_mib", [0, 1])
def test_onnx_scores_as_evaluated(source, artefact, one_rank, cache_mib):
    assert largest_difference(source, artefact, one_rank, history_cache_mib=cache_mib) <= TOLERANCE


def test_a_cache_beside_torch_scores_as_evaluated(source, tmp_path, one_rank):
    export(source, tmp_path / "ctr")
    assert largest_difference(source, tmp_path / "ctr", one_rank, history_cache_mib=1) <= TOLERANCE


def requests_of(artefact):
    requests = open_version(artefact).read_json("examples.json")["requests"]
    longest = max(requests, key=lambda request: len(set(request["history.item"])))
    history = [name for name in longest if name.startswith("history.")]

    def cut(first, last, later_s=0):
        made = longest | {name: longest[name][first:last] for name in history}
        return made | {"request_time_s": longest["request_time_s"] + later_s}

    return cut


def test_a_history_is_encoded_once_and_extended(artefact):
    """The same at another time; two more events; another user with the same beginning; a window that slides."""
    cached, plain, cut = load(artefact, history_cache_mib=4), load(artefact), requests_of(artefact)
    cached.two_part.cache.__init__(4 << 20)  # the examples were replayed
    visits = [(0, 6), (0, 6), (0, 8), (0, 10), (1, 11), (0, 5)]
    for (first, last), counts in zip(
        visits, [(0, 0, 1), (1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 2, 3)], strict=True
    ):
        request = cut(first, last, later_s=86_400)
        (found,), (expected,) = cached.score([request]), plain.score([request])
        for task, columns in expected.tasks.items():
            assert np.abs(np.subtract(found.tasks[task]["logit"], columns["logit"])).max() <= TOLERANCE
        cache = cached.two_part.cache
        assert (cache.hits, cache.extended, cache.misses) == counts, (first, last)
    together = [cut(*visit) for visit in visits]
    for found, expected in zip(cached.score(together), plain.score(together), strict=True):
        assert np.abs(np.subtract(found.tasks["click"]["logit"], expected.tasks["click"]["logit"])).max() <= TOLERANCE


def columns(*items, bag=False):
    item = np.array(items, np.int64)
    return {"item": item, "tags": (np.repeat(item, 2), np.arange(0, 2 * len(item) + 1, 2))} if bag else {"item": item}


@pytest.mark.parametrize("bag", [False, True])
def test_the_key_is_what_the_history_is(bag):
    whole = columns(5, 6, 7, bag=bag)
    assert prefix_hash(whole, 2) == prefix_hash(columns(5, 6, 9, bag=bag), 2)
    keys = [prefix_hash(whole, n) for n in (1, 2, 3)] + [prefix_hash(columns(6, 5, bag=bag), 2)]
    assert len(set(keys)) == 4
    other = {"item": np.array([5, 6]), "price": np.array([0.5, 1.0], np.float32)}
    assert prefix_hash(other, 2) != prefix_hash(other | {"price": np.array([0.5, 1.5], np.float32)}, 2)


def test_the_cache_stays_within_its_memory():
    part = torch.zeros(1, 1, 1, 8, 32)  # 1 KiB
    cache = HistoryCache(10 * 1024)
    for first in range(20):
        cache.put(columns(first), 1, Encoded(part, part))
        assert cache.num_bytes == 2048 * len(cache) <= cache.max_bytes
        if first:
            assert cache.longest(columns(0), 1)[0] == 1  # in use: it stays
    assert len(cache) == 5 and cache.longest(columns(3), 1) == (0, None)
    cache.put(columns(99), 1, Encoded(*(torch.zeros(1, 1, 1, 8, 3200),) * 2))  # larger than all of it
    assert len(cache) == 5
    assert cache.longest(columns(0, *range(50, 50 + MAX_NEW_EVENTS)), 1 + MAX_NEW_EVENTS)[0] == 1
    assert cache.longest(columns(0, *range(50, 51 + MAX_NEW_EVENTS)), 2 + MAX_NEW_EVENTS)[0] == 0


def test_what_is_not_a_transformer_has_no_cache_and_no_onnx(data_dir, tmp_path, one_rank):
    run = tiny_run("finetune", data_dir, tmp_path / "run", model={"name": "din"}, train={"max_steps": 1})
    train_runs(0, 1, [run])
    source = read_source(tmp_path / "run", str(data_dir))
    export(source, tmp_path / "ctr")
    with pytest.raises(ValueError, match="exact for the Transformer alone, this is DIN"):
        load(tmp_path / "ctr", history_cache_mib=1)
    with pytest.raises(ValueError, match="--engine onnx serves the Transformer, this is DIN"):
        export(source, tmp_path / "other", Options(engine="onnx"))


@pytest.mark.parametrize("content", [b"", b"no ONNX", b"\x08\x0a" * 50])
def test_a_broken_onnx_file_is_a_named_error(artefact, content):
    path = open_version(artefact).folder / "score.onnx"
    original = path.read_bytes()
    try:
        path.write_bytes(content.ljust(len(original), b"\0"))
        with pytest.raises(ArtefactError, match=r"score\.onnx cannot be run by ONNX Runtime"):
            load(artefact, verify=False)
    finally:
        path.write_bytes(original)
