"""Scores requests with a version of an artefact: raw ids in, logits and probabilities out, in one process.

    from gpsd_dist.serving import load

    scorer = load("artefacts/ctr")
    [answer] = scorer.score([{"request_time_s": 1399161600, "history.item": ["8001"], "history.time_s": [1399100000],
                              "candidate.item": ["17", "4"]}])
    answer.tasks["click"]["probability"]           # one per candidate

It runs the trained `RankingModel` itself, on a batch made here, so that what is served is what was evaluated. Needs
neither torchrec nor a process group.

Shape letters: B requests, C candidates.
"""

import collections.abc
import dataclasses
import functools
import os
import pathlib
import time
import typing

import numpy as np
import pyarrow as pa
import torch

from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.serving.answer import Answer as Answer
from gpsd_dist.serving.artefact import BLOBS, Artefact, ArtefactError, open_version
from gpsd_dist.serving.batches import pack
from gpsd_dist.serving.counters import Counters, open_counters
from gpsd_dist.serving.drift import STATISTICS_NAME, reference
from gpsd_dist.serving.examples import replay
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.requests import Limits, RequestReader
from gpsd_dist.serving.tables import MappedTable, read_tensors
from gpsd_dist.serving.tokens import Tokens
from gpsd_dist.serving.two_part import ENCODE_NAME, SCORE_NAME, TwoPart, with_onnx, with_torch
from gpsd_dist.serving.vocabulary import Vocabulary

MODEL_NAME, TOWER_NAME, ITEMS_NAME = "model.json", "tower.safetensors", "items.safetensors"
_REQUESTS_AT_ONCE = 64  # untuned: bounds the memory of `score`
Make: typing.TypeAlias = collections.abc.Callable[
    [Manifest, TablesConfig, ModelConfig, tuple[Table, ...]], torch.nn.Module
]


class Scorer:
    """One version, loaded. Immutable; `score_tokens` may run in several threads."""

    def __init__(self, artefact: Artefact, cache_bytes: int = 0, counters: Counters | None = None):
        """`counters`: instead of those of the artefact."""
        self.artefact = artefact
        self.version, self.manifest = artefact.version, artefact.manifest
        self.metadata = dataclasses.asdict(artefact.description)
        self.reference = reference(artefact.read_json(STATISTICS_NAME))
        """Means of the training split, by the names of `drift.means`."""
        self.vocabularies = open_vocabularies(artefact, [table.name for table in self.manifest.tables])
        self.reader = open_reader(artefact, self.vocabularies, counters=counters)
        self.limits = self.reader.limits
        trained = artefact.read_json(MODEL_NAME).get("tasks")
        self.tasks = tuple(task for task in self.manifest.tasks if isinstance(trained, list) and task.name in trained)
        if not self.tasks:
            raise ArtefactError(
                f"{artefact.folder} scores no task; an index is searched: python -m gpsd_dist.index search"
            )
        names = tuple(task.name for task in self.tasks)
        offset = artefact.read_json(MODEL_NAME).get("offset", "")
        self.model = build_model(artefact, functools.partial(RankingModel, tasks=names, offset=offset))
        self.tables = map_tables(artefact.root, artefact.description.tables)

        self.two_part = _two_part(artefact, self.model, tuple(task.name for task in self.tasks), cache_bytes)

    def score(self, requests: collections.abc.Sequence[dict[str, typing.Any]] | pa.Table) -> list[Answer]:
        """Scores raw requests, as decoded JSON or as an Arrow table of the same columns (`serving.requests`).

        RequestError names the request and column that is wrong.
        """
        table = requests if isinstance(requests, pa.Table) else self.reader.from_json(requests)
        answers: list[Answer] = []
        for tokens in self.reader.batches(table, _REQUESTS_AT_ONCE):
            answers += self.answers(tokens, self.score_tokens(tokens))
        return answers

    def score_tokens(
        self, tokens: Tokens, observe: collections.abc.Callable[[str, float], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Computes task -> logits float32 [C] in the caller's order, in one pass over all requests.

        `observe` hears the seconds of the phases "lookup" and "score".
        """
        started_s = time.perf_counter()
        packed = pack(tokens, self.manifest, self.tables)
        packed_s = time.perf_counter()
        results = {task.name: np.empty(len(packed.candidate_C), np.float32) for task in self.tasks}
        if len(packed.candidate_C):
            with torch.inference_mode():
                if self.two_part is None:
                    logits = self.model(packed.embeddings, packed.batch)
                else:
                    logits = self.two_part(packed.embeddings, packed.batch, packed.history)
            for name, result in results.items():
                result[packed.candidate_C] = logits[name].numpy()
        if observe is not None:
            observe("lookup", packed_s - started_s)
            observe("score", time.perf_counter() - packed_s)
        return results

    def numbers(self, logits: collections.abc.Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        """Makes of the logits of `score_tokens` what is answered: task -> "logit", "probability", "product" -> [C]."""
        probabilities = {name: 1 / (1 + np.exp(-logit_C.astype(np.float64))) for name, logit_C in logits.items()}
        found: dict[str, dict[str, np.ndarray]] = {}
        for task in self.tasks:
            found[task.name] = {"logit": logits[task.name], "probability": probabilities[task.name]}
            if task.given in probabilities:
                found[task.name]["product"] = _product(self.manifest, task.name, probabilities)
        return found

    def counters_age_s(self, tokens: Tokens) -> collections.abc.Sequence[int | None]:
        """Returns how long before each request the counters end, in seconds; None where the model counts nothing."""
        counters = self.reader.counters
        if counters is None:
            return [None] * len(tokens)
        return typing.cast(list[int | None], counters.age_s(tokens.request_time_s_B).tolist())

    def answers(self, tokens: Tokens, logits: collections.abc.Mapping[str, np.ndarray]) -> list[Answer]:
        """Words the logits of `score_tokens`, one answer per request."""
        columns, age_B = self.numbers(logits), self.counters_age_s(tokens)
        facts = zip(tokens.candidate_count_B, tokens.unknown_ids_B, tokens.dropped_events_B, age_B, strict=True)
        stops = np.cumsum(tokens.candidate_count_B)
        return [
            Answer(
                self.version,
                {
                    task: {kind: value_C[stop - count : stop].tolist() for kind, value_C in kinds.items()}
                    for task, kinds in columns.items()
                },
                int(unknown),
                int(dropped),
                age_s,
            )
            for stop, (count, unknown, dropped, age_s) in zip(stops, facts, strict=True)
        ]


def load(
    path: str | os.PathLike[str], *, verify: bool = True, threads: int | None = None, history_cache_mib: float = 0
) -> Scorer:
    """Loads the current version of an artefact, or the version whose folder is given.

    `verify`: compare the hash of every file, and replay the examples. `threads`: of torch, for this whole process.
    `history_cache_mib`: memory for encoded histories of a Transformer, SASRec or HSTU, which are used again where a
    history, or all of it but the last few events, was seen before (`history_cache`); 0: none.
    ArtefactError says what is damaged, missing or different.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    artefact = open_version(path)
    if verify:
        artefact.check_hashes()
    scorer = Scorer(artefact, int(history_cache_mib * 2**20))
    if verify:
        replay(scorer)
    return scorer


def index_name(table: str) -> str:
    """Names the file with the ids of a table in a version."""
    return f"vocab/{table}.index.safetensors"


def _product(manifest: Manifest, task: str, probabilities: dict[str, np.ndarray]) -> np.ndarray:
    """Multiplies the probability of a task by that of what it is given, and of what that is given."""
    given = next(entry.given for entry in manifest.tasks if entry.name == task)
    own = probabilities[task]
    return own if given not in probabilities else own * _product(manifest, given, probabilities)


def _two_part(artefact: Artefact, model: RankingModel, tasks: tuple[str, ...], cache_bytes: int) -> TwoPart | None:
    """Returns what runs the model in two parts, if the engine or a cache asks for it."""
    if artefact.description.engine == "onnx":
        try:
            return with_onnx(model, tasks, artefact.path(ENCODE_NAME), artefact.path(SCORE_NAME), cache_bytes)
        except ValueError as error:
            raise ArtefactError(str(error)) from error
    if not cache_bytes:
        return None
    try:
        return with_torch(model, tasks, cache_bytes)
    except ValueError as error:
        raise ValueError(f"no cache of histories: {error}; leave --history_cache_mib out") from error


def map_tables(
    root: pathlib.Path, entries: collections.abc.Mapping[str, dict[str, typing.Any]]
) -> dict[str, MappedTable]:
    """Maps the tables of a description, whose parts are blobs below `root`."""
    return {
        name: MappedTable(
            name, [root / BLOBS / part for part in entry["blobs"]], entry["dtype"], entry["num_rows"], entry["width"]
        )
        for name, entry in entries.items()
    }


def open_vocabularies(artefact: Artefact, tables: collections.abc.Iterable[str]) -> dict[str, Vocabulary]:
    """Opens the index of each of the tables; hashed ones need none."""
    sizes = {n: artefact.manifest.table(n).num_rows for n in tables if artefact.manifest.unbounded.get(n) != "hashed"}
    try:
        return {name: Vocabulary.open(artefact.path(index_name(name)), size) for name, size in sizes.items()}
    except ArtefactError:
        raise
    except ValueError as error:
        raise ArtefactError(str(error)) from error


def open_reader(
    artefact: Artefact,
    vocabularies: dict[str, Vocabulary],
    with_candidates: bool = True,
    counters: Counters | None = None,
) -> RequestReader:
    """Opens what turns raw requests into tokens. `counters`: instead of those of the artefact."""
    try:
        limits, items = Limits(**artefact.description.limits), Items.open(artefact.path(ITEMS_NAME))
        items.check(artefact.manifest)
        if with_candidates and counters is None:
            counters = open_counters(artefact.root, artefact.manifest)
        return RequestReader(artefact.manifest, vocabularies, items, limits, with_candidates, counters)
    except ArtefactError:
        raise
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"{artefact.folder} cannot read requests: {error}") from error


class _WithoutDraws(torch.overrides.TorchFunctionMode):
    """Leaves weights undrawn that are replaced anyway: on "meta", drawing from a normal imports Dynamo (145 MiB)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build_model(artefact: Artefact, make: Make) -> torch.nn.Module:
    """Builds the dense model on its mapped weights. ArtefactError if the options describe another one."""
    place, options = artefact.folder / MODEL_NAME, artefact.read_json(MODEL_NAME)
    weights = read_tensors(artefact.path(TOWER_NAME))
    try:
        model, tables = ModelConfig(**options["model"]), TablesConfig(**options["tables"])
        if model.layers > len(weights):
            raise ValueError(f"{model.layers} layers, for {len(weights)} tensors")
        looked_up = tuple(table for table in artefact.manifest.tables if table.name in artefact.description.tables)
        # On "meta", options that describe a huge model take no memory before the sizes are compared.
        with torch.device("meta"), _WithoutDraws():
            built = make(artefact.manifest, tables, model, looked_up)
        built.load_state_dict(weights, strict=True, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"{place} does not fit {TOWER_NAME}: {type(error).__name__}: {error}") from error
    return built.eval().requires_grad_(False)
