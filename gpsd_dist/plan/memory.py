"""Memory of every rank: what it holds all the time, and what a training step or a validation needs on top."""

import dataclasses

import numpy as np

from gpsd_dist.batch.row_layout import row_geometry
from gpsd_dist.config import RunConfig
from gpsd_dist.model.transformer import ffn_width
from gpsd_dist.plan.all_to_all import INDEX_BYTES, VALUE_BYTES, held_rows
from gpsd_dist.plan.workload import Workload
from gpsd_dist.tables.sharding import Cluster, Shard

_FLOAT, _HALF = 4, 2
_MAX_MASKED_CANDIDATES = 8  # packing.py: with more, attention keeps the scores of candidates
_RANKING_CHUNK_SCORES = 1 << 23  # metrics/ranking.py
_OWN_NEGATIVES_CHUNK = 1 << 21  # losses.py: values of gathered rows
_SCORE_BYTES = 8 + 4 + 1 + 1  # of such a score: float64, float32 and two masks


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What counts, besides the tables themselves."""

    parameters: int
    matrix_parameters: int
    """Of linear layers: bf16 autocast keeps a copy of each in half precision."""
    item_table: str
    item_rows: int
    """V of the item table."""
    auxiliary_rows: int
    """Rows of the largest table that pretraining predicts with a full softmax; 0 without one."""
    head_parameters: int
    """Of the ranking MLPs."""
    head_values: int
    """Values that those keep per candidate: their input and their hidden layers."""
    map_bytes: int = 0
    """Maps of managed tables (docs/ids.md); every rank holds all of them."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes; arrays are float64 [world_size]."""

    tables: np.ndarray
    """Weights."""
    optimizer: np.ndarray
    """State of the tables' optimizer; 0 for frozen tables."""
    dense: int
    """Replicated: weights, gradients, two AdamW moments, and DDP's buckets with more than one rank."""
    maps: int
    """Replicated: maps of managed tables."""
    activations: float | None
    """Kept for the backward of one part of a batch (`micro_batches`); None: there is no formula for this tower."""
    working: float
    """Gradients under way in the backward: two of feed-forward width and two of model width per token."""
    loss: float
    """Logits and gradients of the loss, and what the ranking heads keep."""
    buffers: np.ndarray
    """Looked-up rows on their way to the rank and, for trained tables, their gradients on the way back."""
    validation: np.ndarray
    """Instead of activations, working, loss and buffers, while `valid` is scored."""

    @property
    def held(self) -> np.ndarray:
        """What is there all the time."""
        return self.tables + self.optimizer + self.dense + self.maps

    @property
    def peak(self) -> np.ndarray:
        """Held, and the larger one of training step and validation."""
        return self.held + np.maximum(self.step, self.validation)

    @property
    def step(self) -> np.ndarray:
        """What a training step needs on top of `held`."""
        return (self.activations or 0.0) + self.working + self.loss + self.buffers


def memory(
    run: RunConfig,
    shards: tuple[Shard, ...],
    size: ModelSize,
    cluster: Cluster,
    training: Workload,
    validation: Workload | None,
) -> Memory:
    """`training`, `validation`: of one rank; None: nothing is validated."""
    tables, optimizer = np.zeros(cluster.world_size), np.zeros(cluster.world_size)
    for shard in shards:
        tables[shard.rank] += shard.rows * shard.columns * shard.value_bytes
        optimizer[shard.rank] += table_state_bytes(run.sparse.name, shard)
    activations, working = None, 0.0
    if run.model.name == "transformer":
        activations, working = transformer_bytes(run, training, cluster.device_type)
    scored = np.zeros(cluster.world_size)
    if validation is not None:
        scored = validation_bytes(run, shards, cluster, validation, size.item_rows)
    return Memory(
        tables=tables,
        optimizer=optimizer,
        dense=dense_bytes(run, size, cluster.world_size),
        maps=size.map_bytes,
        activations=activations,
        working=working,
        loss=loss_bytes(run, size, training),
        buffers=buffer_bytes(shards, cluster, training, has_backward=True),
        validation=scored,
    )


def table_state_bytes(optimizer: str, shard: Shard) -> int:
    """State that FBGEMM keeps for one piece of a table, float32."""
    if shard.is_frozen:
        return 0
    values = {
        "sgd": 0,
        "rowwise_adagrad": shard.rows,
        "adagrad": shard.rows * shard.columns,
        "adam": 2 * shard.rows * shard.columns,
        "lamb": 2 * shard.rows * shard.columns,
        "partial_rowwise_adam": shard.rows * shard.columns + shard.rows,
    }
    return values[optimizer] * _FLOAT


def dense_bytes(run: RunConfig, size: ModelSize, world_size: int) -> int:
    """Weights, gradients, exp_avg, exp_avg_sq, all float32; DDP's buckets; bf16 copies of matrices under autocast.

    FSDP2 keeps a rank's part of the four, and gathered: weights and gradients of two blocks, and what is in no block.
    Where parts of a batch add up (`micro_batches`), it keeps the gradients of all blocks whole until the last part.
    """
    half = _HALF * size.matrix_parameters if run.train.bf16 else 0
    if run.execution.dense_parallel == "fsdp2" and world_size > 1:
        of_blocks = min(1.0, 2 / run.model.layers)
        gathered = (of_blocks + (1 if run.train.micro_batches > 1 else of_blocks)) * size.matrix_parameters
        gathered += 2 * (size.parameters - size.matrix_parameters)
        return round(
            4 * _FLOAT * size.parameters / world_size + _FLOAT * gathered + half * min(1, 2 / run.model.layers)
        )
    copies = 5 if world_size > 1 else 4
    return copies * _FLOAT * size.parameters + half


def transformer_bytes(run: RunConfig, step: Workload, device_type: str) -> tuple[float, float]:
    """(what the Transformer keeps for its backward, gradients under way in it).

    Per token and layer, with width D, feed-forward width F and v bytes per value (4; with autocast 2): the inputs of
    two norms 8 D and their outputs 2 v D (on CPU the outputs in float32, 8 D, and in v if that is another type);
    attention's output v D; gate and up 2 v F, SiLU v F (not on CPU without autocast, see `model/swiglu.py`), product
    v F; two dropout masks if there are any; and what `_attention_bytes` says. In the last layer of ranking, histories
    give queries, keys and values only. Once: the rotations of three times D / 2 complex numbers per token (on CUDA of
    one head). On CPU without autocast, what a norm's gain is multiplied with is kept, too: the tokens or the weight
    behind the norm, whichever has fewer rows (`model/norms.py`).
    """
    model, width, layers = run.model, run.model.width, run.model.layers
    parts, is_ranking = run.train.micro_batches, run.stage != "pretrain"
    value, is_cpu = _HALF if run.train.bf16 else _FLOAT, device_type == "cpu"
    norm = (_FLOAT + (0 if is_cpu and not run.train.bf16 else value)) * width
    tokens, candidates = step.tokens / parts, step.candidates / parts
    mask = width * (value if is_cpu else 1) if model.dropout else 0
    hidden = (3 if is_cpu and not run.train.bf16 else 4) * value * ffn_width(width)
    behind_attention = value * width + norm + hidden + 2 * mask
    attention, once = _attention_bytes(run, step, device_type)
    every = last = (tokens + candidates) * (norm + behind_attention) + attention / parts
    if is_ranking:
        last = (tokens + candidates) * norm + candidates * behind_attention + attention / parts
        if not _in_rows(step, device_type):  # a history's own attention is not computed
            last -= tokens * (value * width + _FLOAT * model.heads)
    if is_cpu and not run.train.bf16:
        every += _gain_bytes(width, tokens + candidates, tokens + candidates)
        last += _gain_bytes(width, tokens + candidates, candidates if is_ranking else tokens)
    around = (candidates if is_ranking else tokens) * _FLOAT * width + once / parts
    around += (tokens + candidates) * 12 * width / (1 if is_cpu else model.heads)
    if run.tables.embedding_dim != width:
        unfused = 2 * _FLOAT if is_cpu else _FLOAT
        around += (tokens + candidates) * (unfused + value) * run.tables.embedding_dim
    widest = candidates + (0 if is_ranking and layers == 1 else tokens)
    blocks = (layers - 1) * every + last
    if run.execution.activation_checkpointing:  # inputs of all blocks, and one block as it is computed again
        inputs = layers * (tokens + candidates) * _FLOAT * width
        blocks = inputs + (every if layers > 1 else last)
    return blocks + around, widest * 2 * value * (ffn_width(width) + width)


def _gain_bytes(width: int, before_attention: float, behind_attention: float) -> float:
    """Of a layer whose two norms see these numbers of tokens."""
    rows = min(before_attention, 3 * width) + min(behind_attention, 2 * ffn_width(width))
    return _FLOAT * width * rows


def _in_rows(step: Workload, device_type: str) -> tuple[float, float] | None:
    """See `packing_rows.row_geometry`; None where attention runs in length buckets or in the flash kernel."""
    if device_type != "cpu":
        return None
    return row_geometry(step.requests, step.tokens / step.requests, step.candidates / step.requests)


def _attention_bytes(run: RunConfig, step: Workload, device_type: str) -> tuple[float, float]:
    """(of one layer, of all together): queries, keys, values and output 4 v D per token, log-sum-exp 4 H.

    In shared rows (CPU) per slot, of which some are padding; the mask of a slot is kept once, with autocast also in
    half precision by every layer. Else the padding of length buckets is not counted, and with candidates there are
    copies of keys and values, 2 v D each, one per history token and candidate; none with `attention.two_part` (CUDA
    with autocast). Above 8 candidates per request `attention.bucketed` keeps a weight of 4 H (6 H with autocast) per
    pair besides.
    """
    value, width, heads = _HALF if run.train.bf16 else _FLOAT, run.model.width, run.model.heads
    tokens, in_rows = step.tokens + step.candidates, _in_rows(step, device_type)
    per_token = 4 * value * width + _FLOAT * heads
    if in_rows is None:
        return tokens * per_token + _candidate_bytes(run, step, device_type), 0.0
    slots, mask = tokens * in_rows[0], in_rows[1]
    half_masks = slots * mask * _HALF if run.train.bf16 else 0
    return slots * per_token + half_masks, 0.0 if run.train.bf16 else slots * mask * _FLOAT


def _candidate_bytes(run: RunConfig, step: Workload, device_type: str) -> float:
    """Of one layer, see `transformer_bytes`."""
    value, width, heads = _HALF if run.train.bf16 else _FLOAT, run.model.width, run.model.heads
    if not step.candidates or (run.train.bf16 and device_type == "cuda"):
        return 0.0
    if step.candidates / step.requests <= _MAX_MASKED_CANDIDATES:
        return 2 * value * width * (step.tokens + step.candidates)
    scores = heads * step.candidate_keys * (_FLOAT + (value if run.train.bf16 else 0))
    return 2 * value * width * (step.tokens + step.candidates) + scores


def loss_bytes(run: RunConfig, size: ModelSize, step: Workload) -> float:
    """Pretraining: negatives (16 bytes each), sampled softmax (4 float32 copies of the M query states, 3 of the U rows,
    logits of one set of negatives, or 3 chunks of rows where every position has its own), full softmax (4 copies of
    its logits). Ranking: what the MLPs keep.
    """
    parts = run.train.micro_batches
    if run.stage == "pretrain":
        positions, unique = step.positions / parts, step.unique_rows[size.item_table]
        logits = {
            "group": positions / run.pretrain.num_negative_groups * run.pretrain.num_negatives,
            "request": step.positions / max(step.requests, 1e-9) * run.pretrain.num_negatives,
            "position": 3 * _OWN_NEGATIVES_CHUNK,
        }[run.pretrain.negatives_per]
        states = (4 * positions + 3 * unique) * run.tables.embedding_dim
        values = states + logits + 4 * positions * size.auxiliary_rows
        return _FLOAT * values + 2 * INDEX_BYTES * step.negatives
    return _FLOAT * step.candidates / parts * size.head_values


def buffer_bytes(shards: tuple[Shard, ...], cluster: Cluster, step: Workload, *, has_backward: bool) -> np.ndarray:
    """[world_size]: rows as their owner looks them up, as they arrive and in order; gradients the same way back."""
    owned, arriving = np.zeros(cluster.world_size), 0.0
    for shard, count in zip(shards, held_rows(shards, step.unique_rows), strict=True):
        passes = 2 if has_backward and not shard.is_frozen else 1
        size = count * (shard.columns * VALUE_BYTES * passes + 2 * INDEX_BYTES)
        owned[shard.rank] += size * cluster.world_size
        arriving += 2 * size
    return owned + arriving


def validation_bytes(
    run: RunConfig, shards: tuple[Shard, ...], cluster: Cluster, step: Workload, item_rows: int
) -> np.ndarray:
    """[world_size]: forward without saved activations (3 F + 4 D values per token of one layer) and looked-up rows.

    Pretraining ranks all items: a rank's part of the item table, twice while it is put together; then the queries of
    all ranks in float32 and float64, and a chunk of scores.
    """
    value, width = _HALF if run.train.bf16 else _FLOAT, run.model.width
    forward = (step.tokens + step.candidates) * value * (3 * ffn_width(width) + 4 * width)
    scored = forward + buffer_bytes(shards, cluster, step, has_backward=False)
    if run.stage != "pretrain":
        return scored
    block_rows, dim = -(-item_rows // cluster.world_size), run.tables.embedding_dim
    block, queries = block_rows * dim * _FLOAT, cluster.world_size * step.requests
    chunk = min(_RANKING_CHUNK_SCORES / queries, block_rows) * (queries * _SCORE_BYTES + dim * 8)
    return block + np.maximum(scored, max(block, queries * dim * (4 + 8) + chunk))
