"""Replays the requests that come with an artefact: raw values, the tokens they become, and what the model says of them:
logits, or the vector of a user and the scores of the items found.

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
_RESULT, _LOGIT = "result/", "logit/"
_ROW = "row"
_REQUESTS_AT_ONCE = 4


class _Scorer(typing.Protocol):
    artefact: Artefact
    reader: typing.Any

    def score_tokens(self, tokens: Tokens) -> dict[str, np.ndarray]: ...


def tensors_of(
    tokens: Tokens, results: collections.abc.Mapping[str, np.ndarray], prefix: str = _LOGIT
) -> dict[str, torch.Tensor]:
    """Names every array of tokens and results (task -> logits), for a safetensors file."""
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
    arrays |= {f"{prefix}{name}": result for name, result in results.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _scored(scorer: _Scorer, tokens: Tokens) -> dict[str, np.ndarray]:
    """Scores a few requests at a time: all at once would take the most memory that a server ever needs."""
    starts = range(0, len(tokens), _REQUESTS_AT_ONCE)
    orders = [np.arange(start, min(start + _REQUESTS_AT_ONCE, len(tokens))) for start in starts]
    parts = [scorer.score_tokens(taken(tokens, order)) for order in orders]
    return {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}


def tensors_of_search(retriever: typing.Any, tokens: Tokens) -> dict[str, torch.Tensor]:
    """Names every array of tokens, and of what is found for them."""
    found = retriever.facts(tokens)
    return tensors_of(tokens, {name: value for name, value in found.items() if name != _ROW}, _RESULT) | {
        _ROW: torch.from_numpy(found[_ROW])
    }


def largest_distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest |found - expected| / max(1, |expected|); NaN if there is one.

    Rounding grows with the size of a logit. A probability moves by at most 0.25 times this: where a logit is large, its
    derivative p (1 - p) is small.
    """
    return float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max(initial=0))


def replay(scorer: _Scorer) -> float:
    """Scores the examples; returns the largest distance of a logit (see `largest_distance`).

    ArtefactError names the tokens that differ, or the task whose logits do by more than the artefact's tolerance.
    """
    tokens, expected = _read(scorer)
    return _largest(scorer.artefact, tensors_of(tokens, _scored(scorer, tokens)), expected, _LOGIT)


def replay_search(retriever: typing.Any) -> float:
    """Searches for the examples; returns the largest distance of a component of a user's vector, or of a score.

    The best scores must be those of the export, and the items found there must have them here: so what is found is
    equal but for the order of equal items. ArtefactError as `replay` has it.
    """
    tokens, expected = _read(retriever)
    row = expected.pop(_ROW, torch.zeros(0, 0, dtype=torch.int64)).numpy()
    found = retriever.facts(tokens, row if row.ndim == 2 and len(row) == len(tokens) else None)
    del found[_ROW]
    return _largest(retriever.artefact, tensors_of(tokens, found, _RESULT), expected, _RESULT)


def _read(served: typing.Any) -> tuple[Tokens, dict[str, torch.Tensor]]:
    """Reads the examples as tokens, and what was expected of them."""
    artefact, expected = served.artefact, read_tensors(served.artefact.path(EXPECTED_NAME))
    requests = artefact.read_json(REQUESTS_NAME).get("requests")
    if not isinstance(requests, list) or not requests:
        raise ArtefactError(f"{artefact.path(REQUESTS_NAME)} has no requests; export it again")
    try:
        return served.reader(served.reader.from_json(requests)), expected
    except ValueError as error:
        raise ArtefactError(f"the examples of {artefact.folder} are not read any more: {error}") from error


def _largest(
    artefact: Artefact, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str
) -> float:
    """Compares tokens exactly, and what begins with `prefix` within the tolerance; returns the largest distance."""
    if {name: value.shape for name, value in found.items()} != {name: v.shape for name, v in expected.items()}:
        raise ArtefactError(f"{artefact.path(EXPECTED_NAME)} has other columns than this program makes: export again")
    different = [name for name in found if not name.startswith(prefix) and not torch.equal(found[name], expected[name])]
    if different:
        raise ArtefactError(
            f"the examples of {artefact.folder} become other tokens here ({', '.join(sorted(different)[:8])}): this "
            "program reads raw values otherwise than the one that exported it; export it again"
        )
    worst, tolerance = 0.0, artefact.description.tolerance
    for name in (name for name in found if name.startswith(prefix)):
        distance = largest_distance(found[name].numpy(), expected[name].numpy())
        if not distance <= tolerance:
            what = "logits of task" if prefix == _LOGIT else "values of"
            raise ArtefactError(
                f"the examples of {artefact.folder} get {what} {name.removeprefix(prefix)!r} that differ by "
                f"{distance:.2g} here, at most {tolerance:g} is allowed; export it again on such a machine"
            )
        worst = max(worst, distance)
    return worst
