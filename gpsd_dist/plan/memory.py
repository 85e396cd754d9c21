"""Estimates the memory of every rank: what stays allocated, and what a training step or a validation adds."""

import dataclasses

import numpy as np

from gpsd_dist.batch.packing import MAX_MASKED_CANDIDATES
from gpsd_dist.batch.row_layout import row_geometry
from gpsd_dist.config import RunConfig
from gpsd_dist.metrics.ranking import CHUNK_SCORES
from gpsd_dist.model.transformer import ffn_width
from gpsd_dist.plan.all_to_all import INDEX_BYTES, VALUE_BYTES, held_rows
from gpsd_dist.plan.workload import Workload
from gpsd_dist.stages.losses import CHUNK_ELEMENTS
from gpsd_dist.tables.sharding import Cluster, Shard

_FLOAT, _HALF = 4, 2
_SCORE_BYTES = 8 + 4 + 1 + 1  # one score of the full ranking: float64, float32 and two masks


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Holds the sizes of the model, apart from its sharded tables, that memory and FLOPs depend on."""

    parameters: int
    matrix_parameters: int  # weights of linear layers: bf16 autocast keeps a copy of each in half precision
    item_table: str
    item_rows: int  # V, rows of the item table
    auxiliary_rows: int  # rows of the tables that pretraining predicts with a full softmax
    head_parameters: int  # weights of the ranking MLPs
    head_values: int  # values that the ranking MLPs keep per candidate: input and hidden layers
    map_bytes: int = 0  # maps of managed tables (docs/ids.md); every rank holds all of them


@dataclasses.dataclass(frozen=True)
class Memory:
    """Splits the bytes of each rank by purpose; arrays are float64 [world_size]."""

    tables: np.ndarray  # weights
    optimizer: np.ndarray  # state of the tables' optimizer; 0 for frozen tables
    dense: int  # on every rank: weights, gradients, two AdamW moments, and DDP's buckets with more than one rank
    maps: int  # on every rank: maps of managed tables
    activations: float | None  # kept for the backward of one micro-batch; None: a stage that the plan does not know
    working: float  # gradients inside the backward of the tower
    loss: float  # logits and gradients of the loss, and what the ranking heads keep
    buffers: np.ndarray  # looked-up rows, as sent and received; for trained tables their gradients, too
    validation: np.ndarray  # replaces activations, working, loss and buffers while `valid` is scored

    @property
    def held(self) -> np.ndarray:
        """Stays allocated for the whole run."""
        return self.tables + self.optimizer + self.dense + self.maps

    @property
    def peak(self) -> np.ndarray:
        """Adds the larger one of training step and validation to `held`."""
        return self.held + np.maximum(self.step, self.validation)

    @property
    def step(self) -> np.ndarray:
        """Is allocated by a training step on top of `held`."""
        return (self.activations or 0.0) + self.working + self.loss + self.buffers


def memory(
    run: RunConfig,
    shards: tuple[Shard, ...],
    size: ModelSize,
    cluster: Cluster,
    training: Workload,
    validation: Workload | None,
    tower: tuple[float, float] | None = None,
) -> Memory:
    """Estimates the memory of every rank from the work of one; `validation` is None where nothing is validated.

    `tower`: bytes that it keeps for its backward, and gradients inside that; None where they are not known.
    """
    tables, optimizer = np.zeros(cluster.world_size), np.zeros(cluster.world_size)
    for shard in shards:
        tables[shard.rank] += shard.rows * shard.columns * shard.value_bytes
        optimizer[shard.rank] += table_state_bytes(run.sparse.name, shard)
    activations, working = (None, 0.0) if tower is None else tower
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
    """Counts the float32 state that FBGEMM keeps for one piece of a table."""
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
    """Counts float32 weights, gradients, state, DDP's buckets, and autocast's bf16 copies of matrices.

    State: exp_avg and exp_avg_sq, and with `TrainConfig.average_fraction` the mean of the weights. With FSDP2 a rank
    keeps its part of weights, gradients and state. Gathered are weights and gradients of two blocks, in half precision
    with autocast, and all that is in no block. With micro-batches, the gradients of all blocks stay gathered, in
    float32, until the last one.
    """
    half = _HALF * size.matrix_parameters if run.train.bf16 else 0
    copies = 5 if run.train.average_fraction else 4
    if run.execution.dense_parallel == "fsdp2" and world_size > 1:
        of_blocks, value = min(1.0, 2 / run.model.layers) * size.matrix_parameters, _HALF if run.train.bf16 else _FLOAT
        gradients = _FLOAT * size.matrix_parameters if run.train.micro_batches > 1 else value * of_blocks
        around = 2 * _FLOAT * (size.parameters - size.matrix_parameters)
        return round(copies * _FLOAT * size.parameters / world_size + value * of_blocks + gradients + around)
    return (copies + (world_size > 1)) * _FLOAT * size.parameters + half


def transformer_bytes(run: RunConfig, step: Workload, device_type: str) -> tuple[float, float]:
    """Estimates (activations that the Transformer keeps for its backward, gradients inside that backward).

    Kept per token and layer, with width D, feed-forward width F and v bytes per value (4; with autocast 2):
    - inputs of the two norms, 8 D, and their outputs, 2 v D (on CPU in float32, 8 D, and again in v if that differs);
    - attention's output, v D, and what `_attention_bytes` counts;
    - gate and up, 2 v F, SiLU, v F (not on CPU without autocast, see `model/ops/swiglu.py`), their product, v F;
    - two dropout masks, if there is dropout.
    When ranking, histories only give queries, keys and values in the last layer. Kept once per token: three rotations
    of D / 2 complex numbers (on CUDA those of one head). On CPU without autocast each norm also keeps what its gain is
    multiplied with: the tokens or the weight behind the norm, whichever has fewer rows (`model/ops/norms.py`).
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
    if is_ranking:  # a history's own attention is not computed, so candidates attend in length buckets
        in_buckets = _bucket_bytes(run, step, device_type) / parts - tokens * (value * width + _FLOAT * model.heads)
        last = (tokens + candidates) * norm + candidates * behind_attention + in_buckets
        once = once if layers > 1 else 0.0
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
    """Counts what the gains of one layer's two norms keep, given the number of tokens before each."""
    rows = min(before_attention, 3 * width) + min(behind_attention, 2 * ffn_width(width))
    return _FLOAT * width * rows


def _in_rows(step: Workload, device_type: str) -> tuple[float, float] | None:
    """Applies `row_geometry`; None where attention runs in length buckets or in the flash kernel."""
    if device_type != "cpu":
        return None
    return row_geometry(step.requests, step.tokens / step.requests, step.candidates / step.requests)


def _attention_bytes(run: RunConfig, step: Workload, device_type: str) -> tuple[float, float]:
    """Counts (bytes kept by each layer, bytes kept once): 4 v D per token for q, k, v and output, 4 H for log-sum-exp.

    On CPU, sequences share rows: each slot counts, padding included. The mask of a slot is kept once; with autocast
    every layer keeps a copy in half precision instead. On CUDA, the padding of length buckets is not counted.
    """
    in_rows = _in_rows(step, device_type)
    if in_rows is None:
        return _bucket_bytes(run, step, device_type), 0.0
    slots, mask = (step.tokens + step.candidates) * in_rows[0], in_rows[1]
    half_masks = slots * mask * _HALF if run.train.bf16 else 0
    return slots * _token_bytes(run) + half_masks, 0.0 if run.train.bf16 else slots * mask * _FLOAT


def _token_bytes(run: RunConfig) -> int:
    return 4 * (_HALF if run.train.bf16 else _FLOAT) * run.model.width + _FLOAT * run.model.heads


def _bucket_bytes(run: RunConfig, step: Workload, device_type: str) -> float:
    return (step.tokens + step.candidates) * _token_bytes(run) + _candidate_bytes(run, step, device_type)


def _candidate_bytes(run: RunConfig, step: Workload, device_type: str) -> float:
    """Counts what attention of candidates keeps in one layer: copies of keys and values, 2 v D per token.

    `attention.two_part` (CUDA with autocast) makes no copies. Above MAX_MASKED_CANDIDATES per request,
    `attention.bucketed` copies of candidates the query alone, and keeps two weights, (4 + v) H bytes, for each pair of
    candidate and key.
    """
    value, width, heads = _HALF if run.train.bf16 else _FLOAT, run.model.width, run.model.heads
    if not step.candidates or (run.train.bf16 and device_type == "cuda"):
        return 0.0
    if step.candidates / step.requests <= MAX_MASKED_CANDIDATES:
        return 2 * value * width * (step.tokens + step.candidates)
    scores = heads * step.candidate_keys * (_FLOAT + value)
    return value * width * (2 * step.tokens + step.candidates) + scores


def loss_bytes(run: RunConfig, size: ModelSize, step: Workload) -> float:
    """Counts what the losses keep; in finetuning, that is what the ranking MLPs keep.

    In pretraining: 16 bytes per negative; for the sampled softmax 4 float32 copies of the M query states, 3 of the U
    rows, and the logits of one set of negatives (3 chunks of rows where every position has its own set); for the full
    softmax 4 copies of its logits.
    """
    parts = run.train.micro_batches
    if run.stage == "pretrain":
        positions, unique = step.positions / parts, step.unique_rows[size.item_table]
        logits = {
            "group": positions / run.pretrain.num_negative_groups * run.pretrain.num_negatives,
            "request": step.positions / max(step.requests, 1e-9) * run.pretrain.num_negatives,
            "position": 3 * CHUNK_ELEMENTS,
        }[run.pretrain.negatives_per]
        states = (4 * positions + 3 * unique) * run.tables.embedding_dim
        values = states + logits + 4 * positions * size.auxiliary_rows
        return _FLOAT * values + 2 * INDEX_BYTES * step.negatives
    return _FLOAT * step.candidates / parts * size.head_values


def buffer_bytes(shards: tuple[Shard, ...], cluster: Cluster, step: Workload, *, has_backward: bool) -> np.ndarray:
    """Counts looked-up rows at their owner, as received and in order, and gradients on the way back; [world_size]."""
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
    """Counts a forward that saves nothing (3 F + 4 D values per token of one layer) and looked-up rows; [world_size].

    A pretrained model ranks all items. That takes a rank's part of the item table, twice while it is copied together,
    then the queries of all ranks in float32 and float64, and a chunk of scores.
    """
    value, width = _HALF if run.train.bf16 else _FLOAT, run.model.width
    forward = (step.tokens + step.candidates) * value * (3 * ffn_width(width) + 4 * width)
    scored = forward + buffer_bytes(shards, cluster, step, has_backward=False)
    if run.stage != "pretrain":
        return scored
    block_rows, dim = -(-item_rows // cluster.world_size), run.tables.embedding_dim
    block, queries = block_rows * dim * _FLOAT, cluster.world_size * step.requests
    chunk = min(CHUNK_SCORES / queries, block_rows) * (queries * _SCORE_BYTES + dim * 8)
    return block + np.maximum(scored, max(block, queries * dim * (4 + 8) + chunk))
