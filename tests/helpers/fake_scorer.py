"""A scorer of the interface of `gpsd_dist.serving.scorer.Scorer` whose time and faults a test sets; no torch in it.

A server with it: `python -m tests.helpers.fake_server DIR --port 0`. DIR holds `current.json` ({"version": "v1"}) and
`versions/v1.json`: {"offset", "us_per_token", "is_corrupt"}.
"""

import json
import math
import pathlib
import time
import types

import numpy as np
import pyarrow as pa

from gpsd_dist.schema import Feature, Manifest, Table, Task
from gpsd_dist.serving.answer import Answer

MAX_CANDIDATES = 1000
MANIFEST = Manifest(
    source="fake",
    features=(Feature("item", ("history", "candidate"), table="item"), Feature("hour", ("context",), kind="numerical")),
    tables=(Table("item", 1000, "f"),),
    tasks=(Task("click"),),
    splits=(),
    max_history_length=100,
)
COLUMNS = ("user_id", "request_time_s", "history.item", "history.time_s", "candidate.item", "context.hour")


class FakeRequestError(ValueError):
    def __init__(self, column: str, row: int, message: str) -> None:
        super().__init__(message)
        self.column, self.row = column, row


class FakeReader:
    counters = types.SimpleNamespace(as_of_s=1_399_161_600)

    def from_json(self, requests: list[dict]) -> pa.Table:
        for row, request in enumerate(requests):
            for column in request:
                if column not in COLUMNS:
                    raise FakeRequestError(column, row, f"unknown column {column!r}, expected {COLUMNS}")
            for column in ("history.item", "candidate.item"):
                value = request.get(column)
                if not isinstance(value, list) or not all(isinstance(element, str) for element in value):
                    raise FakeRequestError(column, row, f"{column} is {type(value).__name__}, expected a list of text")
            if len(request["candidate.item"]) > MAX_CANDIDATES:
                raise FakeRequestError("candidate.item", row, f"more than {MAX_CANDIDATES} candidates")
        return pa.table({name: pa.array([r.get(name) for r in requests]) for name in COLUMNS})

    def __call__(self, table: pa.Table) -> types.SimpleNamespace:
        history, candidate = table["history.item"].to_pylist(), table["candidate.item"].to_pylist()
        return types.SimpleNamespace(
            history=history,
            candidate=candidate,
            history_length_B=np.array([len(h) for h in history]),
            candidate_count_B=np.array([len(c) for c in candidate]),
            columns={
                "history": {"item": np.full(sum(map(len, history)), 2)},
                "candidate": {"item": np.full(sum(map(len, candidate)), 2)},
                "context": {"hour": np.zeros(len(history), np.float32)},
            },
            counts={"unknown item": 0},
            num_tokens=sum(map(len, history)) + sum(map(len, candidate)),
        )


class FakeScorer:
    def __init__(self, root: pathlib.Path, threads: int = 1, history_cache_mib: float = 0) -> None:
        pointer = json.loads((pathlib.Path(root) / "current.json").read_text())
        self.version = pointer["version"]
        self.options = json.loads((pathlib.Path(root) / "versions" / f"{self.version}.json").read_text())
        if self.options.get("is_corrupt"):
            raise ValueError(f"{self.version} is damaged")
        self.manifest, self.reader, self.tasks = MANIFEST, FakeReader(), MANIFEST.tasks
        self.metadata = {"engine": "fake", "tables": "not shown"}
        self.reference = {"candidates": 2.0}

    def score_tokens(self, tokens, observe=lambda phase, seconds: None) -> dict[str, np.ndarray]:
        observe("lookup", 0.0)
        time.sleep(tokens.num_tokens * self.options.get("us_per_token", 0) / 1e6)
        if any("explode" in candidates for candidates in tokens.candidate):
            raise RuntimeError("a request that the model cannot bear")
        return {"click": np.array([logit for row in tokens.candidate for logit in self.logits(row)], np.float32)}

    def logits(self, candidates: list[str]) -> list[float]:
        return [len(c) + self.options.get("offset", 0) for c in candidates]

    def answers(self, tokens, logits) -> list[Answer]:
        return [
            Answer(self.version, {"click": {"logit": z, "probability": [1 / (1 + math.exp(-x)) for x in z]}}, 0, 0)
            for z in map(self.logits, tokens.candidate)
        ]


def write_version(root: pathlib.Path, version: str, **options: object) -> None:
    """Writes a version and makes it current."""
    (root / "versions").mkdir(parents=True, exist_ok=True)
    (root / "versions" / f"{version}.json").write_text(json.dumps(options))
    make_current(root, version)


def make_current(root: pathlib.Path, version: str) -> None:
    aside = root / "current.json.tmp"
    aside.write_text(json.dumps({"version": version}))
    aside.replace(root / "current.json")
