"""Transformer, SASRec and HSTU in two parts (torch, ONNX, cached histories) score as they do in one."""

import functools
import logging
import logging.handlers
import warnings

import numpy as np
import pytest
import torch

from gpsd_dist.export.exporter import export, read_source
from gpsd_dist.export.options import Options
from gpsd_dist.serving.artefact import ArtefactError, open_version
from gpsd_dist.serving.batches import pack
from gpsd_dist.serving.history_cache import MAX_NEW_EVENTS, Encoded, HistoryCache, prefix_hash
from gpsd_dist.serving.scorer import load
from tests.integration.test_export import data_dir as data_dir
from tests.integration.test_export import evaluated, largest_difference
from tests.integration.tiny_data import tiny_run, train_runs

pytestmark = pytest.mark.timeout(600)
TOLERANCE = 1e-5


TOWERS = {
    "transformer": {},
    "sasrec": {"name": "sasrec", "ffn_width": 40},
    # HSTU scales its input by sqrt(D): 0.3 would give logits of 28, whose last digit is 2e-6.
    "hstu": {"name": "hstu", "head_width": 10, "init_std": 0.1},
    "hstu without times": {"name": "hstu", "time_bias": False, "init_std": 0.1},
}
# An export to ONNX takes 12 s of CPU. All towers run the same forms with torch, whose tests are below.
ONNX = ["transformer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sasrec", "hstu"))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, data_dir, one_rank):
    """Two layers, with weights large enough for an error to show; projected, because the tables are narrower."""
    folder, shape = tmp_path_factory.mktemp("engines"), {"layers": 2, "width": 24, "heads": 2, "init_std": 0.3}
    runs = [
        tiny_run("finetune", data_dir, folder / name, model=shape | model, train={"max_steps": 8})
        for name, model in TOWERS.items()
    ]
    train_runs(0, 1, runs)
    return {name: read_source(folder / name, str(data_dir)) for name in TOWERS}


@pytest.fixture(scope="module")
def artefacts(sources, tmp_path_factory):
    """Gives the artefact of a tower for an engine, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("artefacts")

    @functools.cache
    def made(name: str, engine: str):
        heard, exporter = logging.handlers.BufferingHandler(1000), logging.getLogger("torch.onnx")
        exporter.addHandler(heard)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FutureWarning)
            export(sources[name], folder / name / engine, Options(engine=engine))
            exporter.warning("planted")
        exporter.removeHandler(heard)
        foreign[name, engine] = [str(entry.message) for entry in caught] + [log.getMessage() for log in heard.buffer]
        return folder / name / engine

    return made


@pytest.fixture
def artefact(artefacts):
    return artefacts("transformer", "onnx")


foreign: dict[tuple[str, str], list[str]] = {}
"""Artefact -> the warnings that its export raised."""


def test_an_export_shows_no_warnings_of_torchs_own(artefacts, caplog):
    artefacts("transformer", "onnx")
    heard = foreign["transformer", "onnx"]
    assert "planted" in heard and not [text for text in heard if "LeafSpec" in text or "torchvision" in text]
    logging.getLogger("torch.onnx._internal.exporter._registration").warning("torchvision is not installed. Skipping x")
    assert "torchvision" in caplog.text  # no longer than the export


@pytest.mark.parametrize("name", TOWERS)
def test_logits_are_not_all_alike(name, sources, one_rank):
    logits = torch.cat([logits["click"] for logits, _ in evaluated(sources[name], one_rank)])
    assert logits.std() > 0.1


@pytest.mark.parametrize("cache_mib", [0, 1])
@pytest.mark.parametrize("name", ONNX)
def test_onnx_scores_as_evaluated(name, sources, artefacts, one_rank, cache_mib):
    assert (
        largest_difference(sources[name], artefacts(name, "onnx"), one_rank, history_cache_mib=cache_mib) <= TOLERANCE
    )


@pytest.mark.parametrize("name", TOWERS)
def test_a_cache_beside_torch_scores_as_evaluated(name, sources, artefacts, one_rank):
    assert largest_difference(sources[name], artefacts(name, "eager"), one_rank, history_cache_mib=1) <= TOLERANCE


def requests_of(artefact):
    requests = open_version(artefact).read_json("examples.json")["requests"]
    longest = max(requests, key=lambda request: len(set(request["history.item"])))
    history = [name for name in longest if name.startswith("history.")]

    def cut(first, last, later_s=0):
        made = longest | {name: longest[name][first:last] for name in history}
        return made | {"request_time_s": longest["request_time_s"] + later_s}

    return cut


@pytest.mark.parametrize(
    ("name", "engine"), [("transformer", "onnx"), *((name, "eager") for name in TOWERS if name != "transformer")]
)
def test_a_history_is_encoded_once_and_extended(name, engine, artefacts):
    """The same at another time; two more events; another user with the same beginning; a window that slides.

    HSTU keeps all but the last event, which depends on the time of the request: so it extends where others hit.
    """
    artefact = artefacts(name, engine)
    cached, plain, cut = load(artefact, history_cache_mib=4), load(artefact), requests_of(artefact)
    cached.two_part.cache.__init__(4 << 20)  # the examples were replayed
    visits = [(0, 6), (0, 6), (0, 8), (0, 10), (1, 11), (0, 5)]
    expected_counts = [(0, 0, 1), (1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 2, 3)]
    if name == "hstu":
        expected_counts = [(0, hits + extended, misses) for hits, extended, misses in expected_counts]
    for (first, last), counts in zip(visits, expected_counts, strict=True):
        request = cut(first, last, later_s=86_400 * (1 + last - first))
        (found,), (expected,) = cached.score([request]), plain.score([request])
        for task, columns in expected.tasks.items():
            assert np.abs(np.subtract(found.tasks[task]["logit"], columns["logit"])).max() <= TOLERANCE
        cache = cached.two_part.cache
        assert (cache.hits, cache.extended, cache.misses) == counts, (first, last)
    together = [cut(*visit) for visit in visits]
    for found, expected in zip(cached.score(together), plain.score(together), strict=True):
        assert np.abs(np.subtract(found.tasks["click"]["logit"], expected.tasks["click"]["logit"])).max() <= TOLERANCE


def test_a_feature_of_any_name_is_part_of_the_key(artefacts):
    """HSTU adds the times of events to the key; a feature that is called as they were once took their place."""
    scorer, cut = load(artefacts("hstu", "eager"), history_cache_mib=4), requests_of(artefacts("hstu", "eager"))
    tokens = scorer.reader(scorer.reader.from_json([cut(0, 6)]))
    cache = scorer.two_part.cache
    cache.__init__(4 << 20)  # the examples were replayed
    for value in (1, 2, 1):
        packed = pack(tokens, scorer.manifest, scorer.tables)
        with torch.inference_mode():
            scorer.two_part(packed.embeddings, packed.batch, [*packed.history, np.full(6, value)])
    assert (cache.misses, cache.extended) == (2, 1)


def columns(*items, bag=False):
    item = np.array(items, np.int64)
    return [item, (np.repeat(item, 2), np.arange(0, 2 * len(item) + 1, 2))] if bag else [item]


@pytest.mark.parametrize("bag", [False, True])
def test_the_key_is_what_the_history_is(bag):
    whole = columns(5, 6, 7, bag=bag)
    assert prefix_hash(whole, 2) == prefix_hash(columns(5, 6, 9, bag=bag), 2)
    keys = [prefix_hash(whole, n) for n in (1, 2, 3)] + [prefix_hash(columns(6, 5, bag=bag), 2)]
    assert len(set(keys)) == 4
    item, prices = np.array([5, 6]), np.array([[0.5, 1.0], [0.5, 1.5]], np.float32)
    assert prefix_hash([item, prices[0]], 2) != prefix_hash([item, prices[1]], 2)


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


def test_a_tower_of_pairs_has_no_cache_and_no_onnx(data_dir, tmp_path, one_rank):
    run = tiny_run("finetune", data_dir, tmp_path / "run", model={"name": "din"}, train={"max_steps": 1})
    train_runs(0, 1, [run])
    source = read_source(tmp_path / "run", str(data_dir))
    export(source, tmp_path / "ctr")
    with pytest.raises(ValueError, match=r"no cache of histories: only Transformer, SASRec, HSTU .* this is DIN"):
        load(tmp_path / "ctr", history_cache_mib=1)
    with pytest.raises(ValueError, match=r"--engine onnx: only Transformer, SASRec, HSTU .* this is DIN"):
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
