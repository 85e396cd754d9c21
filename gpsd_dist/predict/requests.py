"""Scores raw requests in Parquet files with an exported model. Needs no TorchRec.

Shape letters: B requests, C candidates.
"""

import collections
import pathlib
import typing

import numpy as np
import pyarrow as pa

from gpsd_dist.data.gather import one_chunk
from gpsd_dist.disk.writing import write_json
from gpsd_dist.features import raw_ids
from gpsd_dist.predict.output import SUMMARY_NAME, number_fields
from gpsd_dist.serving import request_files
from gpsd_dist.serving.request_files import Part
from gpsd_dist.serving.request_log import COUNTERS_AGE, SCORE_PREFIX
from gpsd_dist.serving.requests import REQUEST_TIME, USER
from gpsd_dist.serving.scorer import Scorer


def predict_requests(
    scorer: Scorer, requests: pathlib.Path, out_dir: pathlib.Path, command: str = ""
) -> dict[str, typing.Any]:
    """Scores every candidate of a Parquet file, or of the files of a folder; returns what `predictions.json` holds.

    One row per candidate, in the order of the requests: user_id, request (number, over all files), request_time_s,
    item_id, version, counters_age_s (null where the model counts nothing), and the columns of each task. ValueError
    names file, request and column of what cannot be read.
    """
    writing = _Writing(scorer)
    parts = request_files.read(scorer.reader, requests)
    candidates = request_files.write(out_dir, writing.schema, map(writing.scored, parts))
    summary = {
        "artefact": str(scorer.artefact.root),
        "version": scorer.version,
        "tasks": [task.name for task in scorer.tasks],
        "requests": writing.requests,
        "candidates": candidates,
        "counts": dict(sorted(writing.counts.items())),
        "largest_difference": writing.largest_difference,
        "files": [request_files.PART_NAME],
        "command": command,
    }
    write_json(out_dir / SUMMARY_NAME, summary)
    return summary


class _Writing:
    """Makes the rows of the output, and adds up what is found."""

    def __init__(self, scorer: Scorer):
        self.scorer, self.requests = scorer, 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.largest_difference: dict[str, float] = {}
        """Task -> of the logits from those in the log that the same version wrote with counters of the same age."""
        names = {task.name for task in scorer.tasks}
        fields = [pa.field(USER, pa.string()), pa.field("request", pa.int64()), pa.field(REQUEST_TIME, pa.int64())]
        fields += [pa.field("item_id", pa.string()), pa.field("version", pa.dictionary(pa.int32(), pa.string()))]
        fields += [pa.field(COUNTERS_AGE, pa.int64())]
        for task in scorer.tasks:
            fields += number_fields(task.name, task.given in names)
        self.schema = pa.schema(fields)

    def scored(self, part: Part) -> pa.Table:
        """Makes the rows of some requests."""
        tokens, sent = part.tokens, part.sent
        age_B = pa.array(self.scorer.counters_age_s(tokens), pa.int64())
        logits = self.scorer.score_tokens(tokens)
        if request_files.is_logged(sent):
            self._compare(sent, logits, tokens.candidate_count_B, age_B)
        self.counts.update(tokens.counts)
        self.requests += len(tokens)
        owner_C = np.repeat(np.arange(len(tokens)), tokens.candidate_count_B)
        users = raw_ids(sent[USER]) if USER in sent.column_names else pa.nulls(len(sent), pa.string())
        columns = [
            users.take(pa.array(owner_C)),
            pa.array(part.first + owner_C),
            pa.array(tokens.request_time_s_B[owner_C]),
            raw_ids(one_chunk(sent[f"candidate.{self.scorer.manifest.item_feature}"]).flatten()),
            pa.DictionaryArray.from_arrays(np.zeros(len(owner_C), np.int32), [self.scorer.version]),
            age_B.take(pa.array(owner_C)),
        ]
        for numbers in self.scorer.numbers(logits).values():
            columns += [pa.array(number_C.astype(np.float32)) for number_C in numbers.values()]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _compare(self, sent: pa.Table, logits: dict[str, np.ndarray], count_B: np.ndarray, age_B: pa.Array) -> None:
        given_B = sent[COUNTERS_AGE] if COUNTERS_AGE in sent.column_names else pa.nulls(len(sent))
        scored_by = zip(sent["version"].to_pylist(), given_B.to_pylist(), age_B.to_pylist(), strict=True)
        is_same_C = np.repeat(
            [version == self.scorer.version and was == age for version, was, age in scored_by], count_B
        )
        for task, logit_C in logits.items():
            if is_same_C.any() and f"{SCORE_PREFIX}{task}" in sent.column_names:
                logged_C = one_chunk(sent[f"{SCORE_PREFIX}{task}"]).flatten().to_numpy(zero_copy_only=False)
                worst = float(np.abs(logged_C - logit_C)[is_same_C].max())
                self.largest_difference[task] = max(worst, self.largest_difference.get(task, 0.0))
