"""Replays the requests that come with an artefact: raw values, the tokens they become, and the logits they get.

A version that gives other tokens, or logits further off than its tolerance, is not served: another library, machine or
program may compute otherwise than the one that exported it.
"""

import collections.abc
import typing

import numpy as np
import torch

from gpsd_dist.serving.artefact import Artefact, ArtefactError
from gpsd_dist.serving.batches import taken
from gpsd_dist.serving.tables import read_tensors
from gpsd_dist.serving.tokens import Tokens

REQUESTS_NAME, EXPECTED_NAME = "examples.json", "expected.safetensors"
_LOGIT = "logit/"
_REQUESTS_AT_ONCE = 4


class _Scorer(typing.Protocol):
    artefact: Artefact
    reader: typing.Any

    def score_tokens(self, tokens: Tokens) -> dict[str, np.ndarray]: ...


def tensors_of(tokens: Tokens, logits: collections.abc.Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Names every array of tokens and logits, for a safetensors file."""
    arrays = {
        "history_length": tokens.history_length_B,
        "candidate_count": tokens.candidate_count_B,
        "history_time_s": tokens.history_time_s_T,
        "request_time_s": tokens.request_time_s_B,
    }
    for place, features in tokens.columns.items():
        for name, values in features.items():
            parts = {"": values} if not isinstance(values, tuple) else {"/values": values[0], "/offsets": values[1]}
            arrays |= {f"{place}.{name}{suffix}": part for suffix, part in parts.items()}
    arrays |= {f"{_LOGIT}{task}": logit_C for task, logit_C in logits.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _scored(scorer: _Scorer, tokens: Tokens) -> dict[str, np.ndarray]:
    """Scores a few requests at a time: all at once would take the most memory that a server ever needs."""
    starts = range(0, len(tokens), _REQUESTS_AT_ONCE)
    orders = [np.arange(start, min(start + _REQUESTS_AT_ONCE, len(tokens))) for start in starts]
    parts = [scorer.score_tokens(taken(tokens, order)) for order in orders]
    return {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}


def replay(scorer: _Scorer) -> float:
    """Scores the examples; returns the largest difference of a logit.

    ArtefactError names the tokens that differ, or the task whose logits do by more than the artefact's tolerance.
    """
    artefact, expected = scorer.artefact, read_tensors(scorer.artefact.path(EXPECTED_NAME))
    requests = artefact.read_json(REQUESTS_NAME).get("requests")
    if not isinstance(requests, list) or not requests:
        raise ArtefactError(f"{artefact.path(REQUESTS_NAME)} has no requests; export it again")
    try:
        tokens = scorer.reader(scorer.reader.from_json(requests))
    except ValueError as error:
        raise ArtefactError(f"the examples of {artefact.folder} are not read any more: {error}") from error
    found = tensors_of(tokens, _scored(scorer, tokens))
    if sorted(found) != sorted(expected):
        raise ArtefactError(f"{artefact.path(EXPECTED_NAME)} has other columns than this program makes: export again")
    different = [name for name in found if not name.startswith(_LOGIT) and not torch.equal(found[name], expected[name])]
    if different:
        raise ArtefactError(
            f"the examples of {artefact.folder} become other tokens here ({', '.join(sorted(different)[:8])}): this "
            "program reads raw values otherwise than the one that exported it; export it again"
        )
    worst, tolerance = 0.0, artefact.description.tolerance
    for name in (name for name in found if name.startswith(_LOGIT)):
        distance = float((found[name] - expected[name]).abs().max()) if len(found[name]) else 0.0
        if not distance <= tolerance:
            raise ArtefactError(
                f"the examples of {artefact.folder} get logits of task {name.removeprefix(_LOGIT)!r} that differ by "
                f"{distance:.2g} here, at most {tolerance:g} is allowed; export it again on such a machine"
            )
        worst = max(worst, distance)
    return worst
