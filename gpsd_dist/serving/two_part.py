"""Runs a tower in its two parts on packed batches, with torch or ONNX Runtime, and with a cache of histories.

Shape letters: B requests, n requests of a bucket, T history tokens of the batch, W tokens of a history, K candidates,
C candidates of the batch, D width, L layers, H heads, A channels of a head, V = W + 1 keys of a candidate.
"""

import collections.abc
import pathlib
import typing

import numpy as np
import torch

from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.packing import Slots
from gpsd_dist.disk import reading
from gpsd_dist.features import Values
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.model.ops.hstu_attention import relate
from gpsd_dist.model.ops.hstu_bias import BucketPairs, time_bucket
from gpsd_dist.serving.history_cache import Encoded, HistoryCache
from gpsd_dist.serving.two_part_form import Encode, Score, is_timed, layers_of

ENCODE_NAME, SCORE_NAME = "encode.onnx", "score.onnx"
ENCODE_INPUTS, SCORE_INPUTS = ("x", "old_keys", "old_values"), ("x", "context", "length", "keys", "values")
TIME_INPUTS = ("time_bucket",)
"""Last inputs of both parts where attention depends on times."""
Part = collections.abc.Callable[..., typing.Any]


class TwoPart:
    """Scores batches like `RankingModel`. Encodes each history once, or not at all where the cache has it."""

    def __init__(self, model: RankingModel, tasks: tuple[str, ...], encode: Part, score: Part, cache_bytes: int = 0):
        self.model, self.tasks, self._encode, self._score = model, tasks, encode, score
        self._is_timed, layers = is_timed(model.backbone.tower), layers_of(model.backbone.tower)
        nothing = torch.zeros(len(layers), 1, layers[0].heads, 0, layers[0].head_width)
        self._nothing = Encoded(nothing, nothing)
        self.cache = HistoryCache(cache_bytes) if cache_bytes else None

    def __call__(
        self, embeddings: dict[str, torch.Tensor], batch: Batch, history: list[Values]
    ) -> dict[str, torch.Tensor]:
        """Returns task -> logits [C] in the order of the batch. `history`: its columns, as rows of tables."""
        x_SD, packing = self.model.backbone.tokens(embeddings, batch), batch.packing
        history_TD, candidate_CD = x_SD.tensor_split([packing.num_history_tokens])
        context = self.model.context
        context_CC = context(embeddings, batch) if context.width else candidate_CD[:, :0]
        request_B, relations = batch.request_time_s_B, None
        if self._is_timed:
            relations = relate(packing, batch.history_time_s_T, request_B, for_kernel=False)
            # What is encoded of an event depends on its time and on that of the next one, as on its features.
            next_T = relations.times.query_S[: packing.num_history_tokens]
            history = [*history, batch.history_time_s_T.numpy(), next_T.numpy()]
        parts, request, token, candidate = [], 0, 0, 0
        for index, bucket in enumerate(packing.buckets):
            last = request + bucket.num_requests, token + bucket.num_tokens, candidate + bucket.num_candidates
            if bucket.num_candidates:
                length_n = packing.history_length_B[request : last[0]]
                columns = [_slice(values, token, last[1]) for values in history]
                x_nWD = _padded(history_TD[token : last[1]], bucket.history, bucket.num_requests, bucket.width)
                times = () if relations is None else _times(relations.pairs[index], request_B[request : last[0], None])
                encoded = self._encoded(x_nWD, length_n, columns, *times[:1])
                shape = bucket.candidate, bucket.num_requests, bucket.max_candidates
                inputs = (_padded(values[candidate : last[2]], *shape) for values in (candidate_CD, context_CC))
                logits = self._score(*inputs, torch.from_numpy(length_n), *encoded, *times[1:]).flatten(1)
                parts.append(logits if bucket.candidate is None else logits[:, bucket.candidate.slot])
            request, token, candidate = last
        return dict(zip(self.tasks, torch.cat(parts, 1), strict=True))

    def _encoded(
        self, x_nWD: torch.Tensor, length_n: np.ndarray, columns: list[Values], *times: torch.Tensor
    ) -> Encoded:
        """Encodes the histories of a bucket: keys and values [L, n, H, W, A], W >= 1. `times`: none or [n, W, W]."""
        if x_nWD.shape[1] == 0:
            x_nWD = x_nWD.new_zeros(len(x_nWD), 1, x_nWD.shape[2])
        if self.cache is None:
            old = (part.expand(-1, len(x_nWD), -1, -1, -1) for part in self._nothing)
            return Encoded(*self._encode(x_nWD, *old, *times))
        ends = np.cumsum(length_n)
        found = []
        for place, (x_WD, end, length) in enumerate(zip(x_nWD, ends, length_n, strict=True)):
            own = [_slice(values, end - length, end) for values in columns]
            known, encoded = self.cache.longest(own, int(length))
            if encoded is None or known < length:
                stop = max(int(length), 1)  # a history without events is one token that nobody attends to
                own_times = (part[place : place + 1, known:stop, :stop] for part in times)
                encoded = Encoded(*self._encode(x_WD[None, known:stop], *(encoded or self._nothing), *own_times))
                # The last event depends on the time of this request, where any does: it is encoded for each.
                num_kept = max(int(length) - self._is_timed, 0)
                self.cache.put(own, num_kept, encoded.first(num_kept) if num_kept < stop else encoded)
            found.append(encoded)
        if len(found) == 1:
            return found[0]
        width = x_nWD.shape[1]
        joined = ([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[3])) for part in parts]
                  for parts in zip(*found, strict=True))  # fmt: skip
        return Encoded(*(torch.cat(parts, 1) for parts in joined))


def with_torch(model: RankingModel, tasks: tuple[str, ...], cache_bytes: int) -> TwoPart:
    """Runs both parts with torch."""
    return TwoPart(model, tasks, Encode(model.backbone.tower).eval(), Score(model, tasks).eval(), cache_bytes)


def with_onnx(
    model: RankingModel, tasks: tuple[str, ...], encode: pathlib.Path, score: pathlib.Path, cache_bytes: int
) -> TwoPart:
    """Runs both parts with ONNX Runtime, on one thread. ValueError if it does not take the files."""
    times = TIME_INPUTS if is_timed(model.backbone.tower) else ()
    parts = _session(encode, ENCODE_INPUTS + times), _session(score, SCORE_INPUTS + times)
    return TwoPart(model, tasks, *parts, cache_bytes)


def _session(path: pathlib.Path, names: tuple[str, ...]) -> Part:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("this artefact was exported with --engine onnx: pip install 'gpsd-dist[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # The arena and the patterns of shapes keep what the largest batch of every shape took: 1.3 GiB after 128 requests.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    content = reading.again(path, path.read_bytes)
    try:
        # From bytes: a file that refers to weights in other files finds none.
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise ValueError(f"{path} cannot be run by ONNX Runtime {onnxruntime.__version__}: {error}") from error
    if (found := tuple(entry.name for entry in session.get_inputs())) != names:
        raise ValueError(f"{path} takes {found}, expected {names}")

    def run(*inputs: torch.Tensor) -> typing.Any:
        given = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
        results = [torch.from_numpy(result) for result in session.run(None, given)]
        return results[0] if len(results) == 1 else results

    return run


def _times(pair: BucketPairs, request_n1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives time buckets int64 of pairs in histories [n, W, W], of candidates with them and themselves [n, V]."""
    history_nWW, candidate_nW = pair.history_nWW, pair.candidate_nW
    if not candidate_nW.shape[1]:  # one token that nobody attends to
        candidate_nW, history_nWW = (candidate_nW.new_zeros(len(candidate_nW), *shape) for shape in ((1,), (1, 1)))
    return history_nWW, torch.cat([candidate_nW, time_bucket(request_n1, request_n1)], 1)


def _padded(packed_t: torch.Tensor, slots: Slots | None, num_requests: int, width: int) -> torch.Tensor:
    """Pads one bucket: [t, ...] -> [n, W, ...]."""
    packed_t = packed_t if slots is None else packed_t.index_select(0, slots.entry)
    return packed_t.unflatten(0, (num_requests, width))


def _slice(values: Values, start: int, stop: int) -> Values:
    if isinstance(values, tuple):
        offsets = values[1][start : stop + 1]
        return values[0][offsets[0] : offsets[-1]], offsets - offsets[0]
    return values[start:stop]
