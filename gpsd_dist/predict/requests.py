"""Scores raw requests in Parquet files with an exported model. Needs no TorchRec.

Shape letters: B requests, C candidates.
"""

import collections
import json
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist.data.gather import one_chunk
from gpsd_dist.features import raw_ids
from gpsd_dist.predict.output import SUMMARY_NAME, claim, number_fields
from gpsd_dist.serving.request_log import ADDED, SCORE_PREFIX
from gpsd_dist.serving.requests import REQUEST_TIME, USER, RequestError
from gpsd_dist.serving.scorer import Scorer

_REQUESTS_READ, _REQUESTS_SCORED = 4096, 64  # at once; untuned


def predict_requests(
    scorer: Scorer, requests: pathlib.Path, out_dir: pathlib.Path, command: str = ""
) -> dict[str, typing.Any]:
    """Scores every candidate of a Parquet file, or of the files of a folder; returns what `predictions.json` holds.

    One row per candidate, in the order of the requests: user_id, request (number, over all files), request_time_s,
    item_id, version, and the columns of each task. ValueError names file, request and column of what cannot be read.
    """
    files = sorted(requests.glob("*.parquet")) if requests.is_dir() else [requests]
    if not files:
        raise ValueError(f"--requests {requests} has no .parquet file; name a file, or a folder that has some")
    claim(out_dir)
    writing, name = _Writing(scorer), "part-00000.parquet"
    aside = out_dir / f".{name}.tmp"
    try:
        with pq.ParquetWriter(aside, writing.schema, compression="zstd") as writer:
            for path in files:
                for part in _parts(path):
                    for scored in writing.scored(path, *part):
                        writer.write_table(scored)
        aside.replace(out_dir / name)
    finally:
        aside.unlink(missing_ok=True)
    summary = {
        "artefact": str(scorer.artefact.root),
        "version": scorer.version,
        "tasks": [task.name for task in scorer.tasks],
        "requests": writing.requests,
        "candidates": writing.candidates,
        "counts": dict(sorted(writing.counts.items())),
        "largest_difference": writing.largest_difference,
        "files": [name],
        "command": command,
    }
    (out_dir / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _parts(path: pathlib.Path) -> typing.Iterator[tuple[int, pa.Table]]:
    """Reads a file in parts: (number of its first request, requests)."""
    first = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(_REQUESTS_READ):
            yield first, pa.Table.from_batches([batch])
            first += batch.num_rows
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); write it again") from error


class _Writing:
    """Makes the rows of the output, and adds up what is found."""

    def __init__(self, scorer: Scorer):
        self.scorer, self.requests, self.candidates = scorer, 0, 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.largest_difference: dict[str, float] = {}
        """Task -> of the logits from those in the log that the same version wrote."""
        names = {task.name for task in scorer.tasks}
        fields = [pa.field(USER, pa.string()), pa.field("request", pa.int64()), pa.field(REQUEST_TIME, pa.int64())]
        fields += [pa.field("item_id", pa.string()), pa.field("version", pa.dictionary(pa.int32(), pa.string()))]
        for task in scorer.tasks:
            fields += number_fields(task.name, task.given in names)
        self.schema = pa.schema(fields)

    def scored(self, path: pathlib.Path, first: int, part: pa.Table) -> typing.Iterator[pa.Table]:
        """Scores a part of a file."""
        is_logged = all(name in part.column_names for name in ADDED)
        logged = [name for name in part.column_names if name in ADDED or name.startswith(SCORE_PREFIX)]
        requests, start = part.drop_columns(logged) if is_logged else part, 0
        try:
            for tokens in self.scorer.reader.batches(requests, _REQUESTS_SCORED):
                logits = self.scorer.score_tokens(tokens)
                sent = part.slice(start, len(tokens))
                yield self._rows(sent, tokens.candidate_count_B, tokens.request_time_s_B, logits)
                if is_logged:
                    self._compare(sent, logits, tokens.candidate_count_B)
                self.counts.update(tokens.counts)
                start += len(tokens)
        except RequestError as error:
            raise ValueError(f"{path}: {RequestError(error.column, error.row + first, error.reason)}") from error

    def _rows(
        self, sent: pa.Table, count_B: np.ndarray, time_s_B: np.ndarray, logits: dict[str, np.ndarray]
    ) -> pa.Table:
        owner_C = np.repeat(np.arange(len(count_B)), count_B)
        users = raw_ids(sent[USER]) if USER in sent.column_names else pa.nulls(len(sent), pa.string())
        columns = [
            users.take(pa.array(owner_C)),
            pa.array(self.requests + owner_C),
            pa.array(time_s_B[owner_C]),
            raw_ids(one_chunk(sent[f"candidate.{self.scorer.manifest.item_feature}"]).flatten()),
            pa.DictionaryArray.from_arrays(np.zeros(len(owner_C), np.int32), [self.scorer.version]),
        ]
        for numbers in self.scorer.numbers(logits).values():
            columns += [pa.array(number_C.astype(np.float32)) for number_C in numbers.values()]
        self.requests, self.candidates = self.requests + len(count_B), self.candidates + len(owner_C)
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _compare(self, sent: pa.Table, logits: dict[str, np.ndarray], count_B: np.ndarray) -> None:
        is_same_C = np.repeat([version == self.scorer.version for version in sent["version"].to_pylist()], count_B)
        for task, logit_C in logits.items():
            if is_same_C.any() and f"{SCORE_PREFIX}{task}" in sent.column_names:
                logged_C = one_chunk(sent[f"{SCORE_PREFIX}{task}"]).flatten().to_numpy(zero_copy_only=False)
                worst = float(np.abs(logged_C - logit_C)[is_same_C].max())
                self.largest_difference[task] = max(worst, self.largest_difference.get(task, 0.0))
