"""Finds the items that a pretrained model expects next: raw histories in, raw item ids out, in one process.

    from gpsd_dist.serving.retriever import load

    [found] = load("artefacts/retrieval").search([{"request_time_s": 1399161600, "history.item": ["8001"],
                                                   "history.time_s": [1399100000]}], top=500)
    found.item_ids, found.scores

Items and users are unit vectors in one space, and a score is their cosine, as in pretraining; plus an offset
(`data.item_offsets`) where the model learnt one, from events before the request. Needs no TorchRec.

Shape letters: B requests, V items, K items found, E width, R items of a block, P items preselected.
"""

import collections.abc
import dataclasses
import functools
import math
import os
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gpsd_dist.batch.packing import cuts
from gpsd_dist.batch.row_layout import ranges
from gpsd_dist.data.gather import one_chunk
from gpsd_dist.data.item_events import ItemEvents
from gpsd_dist.data.item_offsets import ItemOffsets, Moments
from gpsd_dist.model.gpsd import NextItemModel
from gpsd_dist.model.heads import unit
from gpsd_dist.model.item_score import window_weights
from gpsd_dist.schema import NUM_RESERVED_ROWS
from gpsd_dist.serving.artefact import Artefact, ArtefactError, open_version
from gpsd_dist.serving.batches import pack
from gpsd_dist.serving.examples import EXPECTED_NAME, replay_search
from gpsd_dist.serving.scorer import build_model, map_tables, open_reader, open_vocabularies
from gpsd_dist.serving.tables import read_tensors
from gpsd_dist.serving.tokens import Tokens

ITEM_VECTORS = "item vectors"
"""Names the table of unit vectors in the description of an artefact."""
_REQUESTS_AT_ONCE, _BLOCK_SCORES = 64, 1 << 22  # untuned: bound memory, 16 MiB of scores
_BLOCK_ITEMS = 1 << 18  # at most: ordering the first block takes long, each further one some calls
CATALOGUE_NAME = "catalogue.parquet"
"""Raw id and row of each item that is searched, where those are not all rows of a vocabulary."""
SCORING_NAME, EVENTS_NAME = "scoring.json", "item_events.safetensors"
"""Hold what adds to cosines, and the events that are counted for it, where the model learnt such things."""
EXAMPLES_TOP = 20
_SPARE = 32  # items preselected beyond K
_ERROR = 1e-6  # of a cosine in float32, for widths up to 512 or so (a sum of E products errs by far less than E ulps)


@dataclasses.dataclass(frozen=True)
class Found:
    """Items for one request, best first; none for a user without a history that is known."""

    version: str
    item_ids: list[str]
    scores: list[float]
    unknown_ids: int
    dropped_events: int


class Retriever:
    """One version, loaded. Immutable."""

    def __init__(self, artefact: Artefact):
        self.artefact, self.version, self.manifest = artefact, artefact.version, artefact.manifest
        tables = map_tables(artefact.root, artefact.description.tables)
        if ITEM_VECTORS not in tables:
            raise ArtefactError(
                f"{artefact.folder} holds no {ITEM_VECTORS}; searched is what python -m gpsd_dist.index build makes"
            )
        table = typing.cast(str, self.manifest.feature(self.manifest.item_feature).table)
        read = {feature.table for feature in self.manifest.features_in("history") if feature.table is not None}
        self.reader = open_reader(artefact, open_vocabularies(artefact, sorted(read)), with_candidates=False)
        scoring = artefact.read_json(SCORING_NAME) if SCORING_NAME in artefact.description.files else {}
        days = tuple(scoring.get("recent_days", ()))
        has_bias = bool(scoring.get("item_bias"))
        make = functools.partial(NextItemModel, auxiliary=(), item_bias=has_bias, num_windows=len(days))
        self.model = build_model(artefact, make)
        self._offsets: ItemOffsets | None = None
        learnt = typing.cast(NextItemModel, self.model).item_score
        if learnt is not None:
            bias_V, self._weight_WF = (None if part is None else part.double() for part in learnt.whole())
            events = ItemEvents(**read_tensors(artefact.path(EVENTS_NAME))) if days else None
            self._offsets = ItemOffsets(bias_V, days, events)
        self.vectors = tables.pop(ITEM_VECTORS)
        """Unit vector of each item, behind `NUM_RESERVED_ROWS` that are none. An item's place here is its number."""
        self._tables = tables
        has_catalogue = CATALOGUE_NAME in artefact.description.files
        listed = pq.read_table(
            artefact.path(CATALOGUE_NAME if has_catalogue else f"vocab/{table}.parquet"), memory_map=True
        )
        self.raw_ids = one_chunk(listed["raw_id"])
        """Raw id of each item, from the first that is not reserved."""
        num_items = len(self.raw_ids)
        if num_items + NUM_RESERVED_ROWS != self.vectors.num_rows:
            raise ArtefactError(f"{artefact.folder} has {num_items:,} raw ids for {self.vectors.num_rows:,} item rows")
        self._row_V = one_chunk(listed["row"]).to_numpy() if has_catalogue else None
        """Row of the item table of each item, ascending; None: its number."""

    def search(self, requests: collections.abc.Sequence[dict[str, typing.Any]] | pa.Table, top: int) -> list[Found]:
        """Finds the `top` items of each raw request. Items of its (visible) history are left out.

        RequestError names the request and column that is wrong.
        """
        table = requests if isinstance(requests, pa.Table) else self.reader.from_json(requests)
        found = []
        for tokens in self.reader.batches(table, _REQUESTS_AT_ONCE):
            row_BK, score_BK = self.search_tokens(tokens, top)
            facts = zip(row_BK, score_BK, tokens.unknown_ids_B, tokens.dropped_events_B, strict=True)
            for row_K, score_K, unknown, dropped in facts:
                row_K, score_K = row_K[row_K >= 0], score_K[row_K >= 0]
                ids = self.raw_ids.take(pa.array(row_K - NUM_RESERVED_ROWS)).to_pylist()
                found.append(Found(self.version, ids, score_K.tolist(), int(unknown), int(dropped)))
        return found

    def search_tokens(
        self, tokens: Tokens, top: int, allowed_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds items int64 [B, K] and scores float32 [B, K], best first; -1 and -inf where there are no more.

        An item is its number, which is its row of the item table where all rows are searched. `allowed_B`: an item row
        of each request that competes even if it was seen, as a target does in `evaluate`.
        """
        offsets, row_T = cuts(tokens.history_length_B), tokens.columns["history"][self.manifest.item_feature]
        seen = [np.unique(rows) for rows in np.split(row_T, offsets[1:-1])] if len(tokens) else []
        if allowed_B is not None:
            seen = [rows[rows != allowed] for rows, allowed in zip(seen, allowed_B, strict=True)]
        seen = [self._items_of(rows) for rows in seen]
        query_BE = torch.from_numpy(self.encode(tokens))
        added = None if self._offsets is None else self._added(tokens, query_BE)
        top = min(top, self.vectors.num_rows - NUM_RESERVED_ROWS)
        row_BK, score_BK = _best(query_BE, self.vectors, seen, top, added=added)
        is_none_BK = np.isneginf(score_BK) | (tokens.history_length_B == 0)[:, None]
        return np.where(is_none_BK, -1, row_BK), np.where(is_none_BK, -np.inf, score_BK)

    def facts(self, tokens: Tokens, row_BK: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Computes what `serving.examples` compares: vectors, best scores, items, scores of those or of `row_BK`."""
        vector_BE = self.encode(tokens)
        found_BK, score_BK = self.search_tokens(tokens, EXAMPLES_TOP)
        row_BK = found_BK if row_BK is None else np.clip(row_BK, -1, self.vectors.num_rows - 1)
        index_U, place = np.unique(np.maximum(row_BK, 0), return_inverse=True)
        item_BKE = self.vectors.rows(index_U).numpy()[place.reshape(row_BK.shape)]
        of_row_BK = np.einsum("be,bke->bk", vector_BE, item_BKE)
        if self._offsets is not None:
            added = self._added(tokens, torch.from_numpy(vector_BE))
            of_row_BK = of_row_BK + added.of_pairs(torch.from_numpy(np.maximum(row_BK, 0))).numpy()
        of_row_BK = np.where(row_BK < 0, 0, of_row_BK)
        best_BK = np.where(np.isneginf(score_BK), -2, score_BK).astype(np.float32)  # a cosine is never -2
        return {"vector": vector_BE, "score": best_BK, "score of row": of_row_BK.astype(np.float32), "row": row_BK}

    @property
    def bias_V(self) -> np.ndarray | None:
        """Bias of each item, which adds to its cosine: float32, None where none was learnt."""
        bias = None if self._offsets is None else self._offsets.bias_V
        if bias is None:
            return None
        row_V = np.arange(len(bias)) if self._row_V is None else np.r_[np.zeros(NUM_RESERVED_ROWS, int), self._row_V]
        return bias.float().numpy()[row_V]

    def _added(self, tokens: Tokens, query_BE: torch.Tensor) -> "_Added":
        """Binds what is added to cosines to some requests."""
        offsets, weight_WF = self._offsets, self._weight_WF
        assert offsets is not None
        row_V = None if self._row_V is None else torch.from_numpy(np.r_[np.zeros(NUM_RESERVED_ROWS, int), self._row_V])
        length_B, time_s_B = tokens.history_length_B, torch.from_numpy(tokens.request_time_s_B)
        last_s_B = np.full(len(tokens), -1)
        last_s_B[length_B > 0] = tokens.history_time_s_T[cuts(length_B)[1:][length_B > 0] - 1]
        weight_BW, bound = None, 0.0 if offsets.bias_V is None else float(offsets.bias_V.abs().max())
        if weight_WF is not None and offsets.events is not None:
            weight_BW = window_weights(weight_WF, query_BE, torch.from_numpy(last_s_B), time_s_B)
            bound += float(weight_BW.abs().sum(1).max()) * math.log1p(len(offsets.events)) if len(tokens) else 0
        at = Moments(time_s_B, weight_BW)

        def rows(item: torch.Tensor) -> torch.Tensor:
            return item if row_V is None else row_V[item]

        return _Added(
            lambda item_BK: offsets.of_own(rows(item_BK), at),
            lambda first, stop: offsets.of_all(rows(torch.arange(first, stop)), at),
            bound,
        )

    def _items_of(self, row_N: np.ndarray) -> np.ndarray:
        """Finds the numbers of the items that have these rows (ascending); of a hashed row there may be several."""
        if self._row_V is None:
            return row_N
        first_N, stop_N = (np.searchsorted(self._row_V, row_N, side) for side in ("left", "right"))  # type: ignore[call-overload]
        return ranges(first_N, stop_N - first_N) + NUM_RESERVED_ROWS

    def encode(self, tokens: Tokens) -> np.ndarray:
        """Encodes histories as unit vectors float32 [B, E], in the caller's order; zeros where a history is empty."""
        packed = pack(tokens, self.manifest, self._tables)
        query_BE = torch.zeros(len(tokens), self.vectors.width)
        offsets = packed.batch.packing.history_offsets
        has_history = offsets.diff() > 0
        if has_history.any():
            with torch.inference_mode():
                hidden_TE = unit(self.model(packed.embeddings, packed.batch).hidden_TE)
            query_BE[packed.batch.source_row_B[has_history]] = hidden_TE[offsets[1:][has_history] - 1].clone()
        return query_BE.numpy()


class _Vectors(typing.Protocol):
    num_rows: int

    def rows(self, index_U: np.ndarray) -> torch.Tensor: ...

    def block(self, first: int, stop: int) -> torch.Tensor: ...


class _Added(typing.NamedTuple):
    """Adds to the cosines of some requests, in float64."""

    of_pairs: collections.abc.Callable[[torch.Tensor], torch.Tensor]  # items [B, K] -> [B, K]
    of_block: collections.abc.Callable[[int, int], torch.Tensor]  # items [first, stop) -> [B or 1, R]
    bound: float  # of its size


def _best(
    query_BE: torch.Tensor,
    vectors: _Vectors,
    seen: list[np.ndarray],
    top: int,
    spare: int = _SPARE,
    added: _Added | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the best rows by exact cosine, plus what is added: int64, float32 [B, K]; -inf where all others were seen.

    Scores are summed in float64 and rounded, as `metrics.ranking` does; equal ones are ordered by row. A product in
    float32 preselects; where it could have missed an item, more of them are preselected.
    """
    wanted = min(top + spare, vectors.num_rows - NUM_RESERVED_ROWS)
    rough_BP, row_BP = _preselected(query_BE, vectors, seen, wanted, added)
    index_U, place = np.unique(row_BP.numpy(), return_inverse=True)
    near_BPE = vectors.rows(index_U)[torch.from_numpy(place.reshape(row_BP.shape))].double()
    exact_BP = torch.einsum("be,bpe->bp", query_BE.double(), near_BPE)
    score_BP = (exact_BP if added is None else exact_BP + added.of_pairs(row_BP)).float().numpy()
    score_BP = np.where(rough_BP.isneginf().numpy(), -np.inf, score_BP)
    order = np.lexsort((row_BP.numpy(), -score_BP))[:, :top]
    row_BK, score_BK = (np.take_along_axis(values, order, 1) for values in (row_BP.numpy(), score_BP))
    error = _ERROR * (1 if added is None else 1 + added.bound)
    is_sure_B = rough_BP[:, -1].numpy() + 2 * error < score_BK[:, -1] if top else np.ones(len(query_BE), bool)
    if wanted < vectors.num_rows - NUM_RESERVED_ROWS and not (is_sure_B | np.isneginf(score_BK[:, -1])).all():
        return _best(query_BE, vectors, seen, top, 8 * spare, added)
    return row_BK, score_BK


def _preselected(
    query_BE: torch.Tensor, vectors: _Vectors, seen: list[np.ndarray], wanted: int, added: _Added | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the best of all rows but reserved and seen ones by float32 products: scores [B, P], rows [B, P]."""
    query_N = torch.repeat_interleave(torch.tensor([len(rows) for rows in seen]))
    seen_N = torch.from_numpy(np.concatenate([*seen, np.zeros(0, np.int64)]))
    best_BP, row_BP = torch.empty(len(query_BE), 0), torch.empty(len(query_BE), 0, dtype=torch.int64)
    size = min(_BLOCK_ITEMS, max(1, _BLOCK_SCORES // max(1, len(query_BE))))
    for first in range(NUM_RESERVED_ROWS, vectors.num_rows, size):
        stop = min(first + size, vectors.num_rows)
        score_BR = query_BE @ vectors.block(first, stop).T
        if added is not None:
            score_BR += added.of_block(first, stop).float()
        is_here_N = (seen_N >= first) & (seen_N < stop)
        score_BR[query_N[is_here_N], seen_N[is_here_N] - first] = -torch.inf
        if best_BP.shape[1] < wanted:
            block_BP, place_BP = score_BR.topk(min(wanted, stop - first), dim=1)
        else:
            block_BP, place_BP = _above(score_BR, best_BP[:, -1:])
            if not block_BP.shape[1]:
                continue
        both = torch.cat([best_BP, block_BP], 1), torch.cat([row_BP, place_BP + first], 1)
        best_BP, chosen_BP = both[0].topk(min(wanted, both[0].shape[1]), dim=1)
        row_BP = both[1].gather(1, chosen_BP)
    return best_BP, row_BP


def _above(score_BR: torch.Tensor, least_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the scores above `least_B1` of each query: scores [B, M], padded with -inf, and their places [B, M].

    Few are, behind the first block of items, and to compare all takes a fifth of the time to order them.
    """
    query_N, place_N = (score_BR > least_B1).nonzero(as_tuple=True)
    count_B = torch.bincount(query_N, minlength=len(score_BR))
    slot_N = torch.arange(len(query_N)) - (count_B.cumsum(0) - count_B)[query_N]
    shape = len(score_BR), int(count_B.max()) if len(count_B) else 0
    found_BM, place_BM = score_BR.new_full(shape, -torch.inf), place_N.new_zeros(shape)
    found_BM[query_N, slot_N], place_BM[query_N, slot_N] = score_BR[query_N, place_N], place_N
    return found_BM, place_BM


def load(path: str | os.PathLike[str], *, verify: bool = True) -> Retriever:
    """Loads the current version, or the one whose folder is given.

    `verify`: compare the hash of every file, and replay the examples. ArtefactError says what is damaged, missing or
    different.
    """
    artefact = open_version(path)
    if verify:
        artefact.check_hashes()
    retriever = Retriever(artefact)
    if verify and EXPECTED_NAME in artefact.description.files:  # an index of before has none
        replay_search(retriever)
    return retriever
