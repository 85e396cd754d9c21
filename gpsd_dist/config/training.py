"""Holds the options of training: data, both objectives, optimizers and the loop."""

import collections.abc
import dataclasses
import typing

import pydantic

from gpsd_dist.validation import AUTO, MAY_CHANGE, AtLeast0, AtLeast1, Names, NotNegative, OrAuto, checked, one_of

NEGATIVES_PER = ("group", "request", "position")
SPARSE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb")
CUDA_ONLY_SPARSE_OPTIMIZERS = ("adam", "partial_rowwise_adam", "lamb")  # no fbgemm CPU kernel
_Below1 = typing.Annotated[float, pydantic.Field(ge=0, lt=1)]
_UpTo1 = typing.Annotated[float, pydantic.Field(ge=0, le=1)]
_Positive = typing.Annotated[float, pydantic.Field(gt=0)]
_Positives = typing.Annotated[  # JSON has no tuples
    tuple[_Positive, ...], pydantic.BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


def _one_batch_size(data: "DataConfig") -> collections.abc.Iterator[str]:
    """A batch is cut by requests or by history tokens: with both or neither its size is not defined."""
    if data.global_batch_rows != AUTO and (data.global_batch_rows > 0) == (data.global_batch_tokens > 0):
        given = f"global_batch_rows={data.global_batch_rows}, global_batch_tokens={data.global_batch_tokens}"
        yield f"{given}: set exactly one of them above 0"


@checked(rules=(_one_batch_size,))
class DataConfig:
    """Says how data are read and batched."""

    max_history_length: AtLeast1 = 50
    """Most recent history tokens that the model sees. 50 on Amazon, 200 on Taobao (official settings)."""
    global_batch_rows: typing.Annotated[int, OrAuto] = 512
    """Requests per optimizer step over all ranks; 0 if `global_batch_tokens` is used; 'auto': 16 to 512,
    by the rows of the split."""
    global_batch_tokens: int = 0
    """History tokens per optimizer step over all ranks; 0 if `global_batch_rows` is used."""
    eval_batch_rows_per_rank: AtLeast1 = dataclasses.field(default=1024, metadata=MAY_CHANGE)
    """Requests per evaluation batch of one rank."""
    num_data_shards: AtLeast1 = 16
    """Fixed parts of an epoch that ranks share out; at least the world size, and fixed for the life of a run."""
    num_threads: AtLeast1 = dataclasses.field(default=1, metadata=MAY_CHANGE)
    """Threads per rank that read and collate."""
    prefetch: AtLeast1 = dataclasses.field(default=2, metadata=MAY_CHANGE)
    """Batches per thread that may wait."""
    cache_dir: str = dataclasses.field(default="", metadata=MAY_CHANGE)
    """Folder for decoded row groups that do not fit into memory. Empty: `.decoded` in the folder of the data."""
    cache_gib: NotNegative = dataclasses.field(default=16.0, metadata=MAY_CHANGE)
    """GiB of disk that decoded row groups of a data set may take; 0: none, they are decoded each time (untuned)."""
    unknown_rate: _Below1 = 0.0
    """Share of the known ids of features with a vocabulary that training reads as unknown, each occurrence by itself:
    so the unknown rows are trained, which new items are scored by. Hashed tables have none."""


def _some_negative_groups(pretrain: "PretrainConfig") -> collections.abc.Iterator[str]:
    """Refuses 0 groups, by which the official GPSD's set per request may be meant: that is another option."""
    if pretrain.num_negative_groups < 1:
        given = f"num_negative_groups {pretrain.num_negative_groups}"
        yield f"{given} must be >= 1; for one set per request set negatives_per='request'"


def _popular_draws_are_corrected(pretrain: "PretrainConfig") -> collections.abc.Iterator[str]:
    """Without the correction, a model learns that what is often drawn is seldom the next item."""
    if pretrain.popular_share and not pretrain.log_q:
        yield f"popular_share {pretrain.popular_share:g} without log_q trains against popular items; set log_q=True"


@checked(rules=(_some_negative_groups, _popular_draws_are_corrected))
class PretrainConfig:
    """Sets the generative objective: sampled softmax of the next item, full softmax of its small attributes."""

    temperature: typing.Annotated[float, pydantic.Field(gt=0), OrAuto] = 0.05
    """Cosine similarity is divided by this (0.05: official settings)."""
    negatives_per: typing.Annotated[str, one_of(NEGATIVES_PER)] = "group"
    """Positions that share a set of negatives. group: a part of the rank's; request: those of one history (official
    GPSD, 12-20x the cost); position: none, every one draws its own (HSTU and SASRec, with num_negatives = 128)."""
    num_negative_groups: int = 8
    """G sets per rank and step; of negatives_per = group alone."""
    num_negatives: AtLeast1 = 1024
    """N negatives per set, with replacement; uniform over the known items but for `popular_share`."""
    popular_share: _Below1 = 0.0
    """Part of the negatives that is drawn by the number of events in `pretrain`; needs `log_q`."""
    log_q: bool = False
    """Take log(N x probability of the draw) from a negative's logit, so that the sum over negatives is on average that
    over all items. False: uniform draws as they are (official settings)."""
    item_bias: bool = False
    """Add a learnt bias of the item to its cosine. It is replicated with the dense part: 16 bytes per item and rank."""
    recent_days: _Positives = ()
    """Windows, in days, e.g. (3.0, 14.0): add learnt weight x log(1 + events of the item in that time before the
    predicted event) to its cosine. Takes 8 bytes per event and rank."""
    auxiliary: Names = ()
    """Token features (not bags) that are predicted too, e.g. ("category",)."""
    auxiliary_weight: float = 1.0
    """Weight of the losses of `auxiliary` beside that of the next item."""


@checked()
class FinetuneConfig:
    """Sets the discriminative objective."""

    task_weights: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    """Task -> weight of its loss; tasks not named weigh 1. A weight of 0 leaves the task's head out."""
    esmm: bool = False
    """Train a task given another one on P(given) x P(task | given) over all candidates (arXiv:1804.07931)
    instead of on the candidates where the other label is 1."""
    weighted_metrics: bool = False
    """Metrics count a candidate as often as its weight says, as the losses do, where the data set has weights."""
    next_behaviour_weight: NotNegative = 0.0
    """dien, dmin: weight of the auxiliary loss of arXiv:1809.03672, which predicts each next history token from the
    state before it, against a random one of the batch. 0, as in the official variants: without."""
    warm_start: bool = False
    """FT, FT_SF: take over all of INIT_CHECKPOINT, a finetuning of the same model: every table, and the heads too, to
    go on with new rows (docs/daily.md). Its optimizers start anew. False: the tower, and TRANSFER_TABLES."""
    offset: str = ""
    """Numerical feature of candidates that holds the log-odds of the first trained task by another model: its logit is
    the feature's value plus what this model learns, a residual (docs/train.md). "rates": those of the days before, of
    data built with --rates. Empty: none."""


@checked()
class OptimizerConfig:
    """Sets one optimizer; a run has two, `dense` and `sparse`."""

    name: typing.Annotated[str, one_of(("adamw", *SPARSE_OPTIMIZERS))]
    """dense: adamw. sparse: rowwise_adagrad, adagrad or sgd; on CUDA also adam, partial_rowwise_adam or lamb."""
    peak_lr: typing.Annotated[NotNegative, OrAuto]
    """Learning rate after warm-up, where the cosine begins. 'auto' (dense alone): 5e-3 (finetuning: 3e-3) up to
    width 64, beyond it as 1 / width, at least 5e-4."""
    beta1: float = 0.9
    """Decay of the mean of gradients per step; Adam family and LAMB."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients per step; Adam family and LAMB."""
    eps: NotNegative = 1e-8
    """Number that is added to the root of squared gradients before a step is divided by it."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay per step, times the learning rate; dense: of linear matrices alone."""


@checked()
class TrainConfig:
    """Sets the length of the loop, its pauses, what it keeps and how long it waits."""

    epochs: typing.Annotated[AtLeast1, OrAuto] = 10
    """Passes over the training split; also the length of the cosine; 'auto': 10 to 15 in pretraining, 3 to 16 in
    finetuning, the more the smaller the log."""
    max_steps: AtLeast0 = dataclasses.field(default=0, metadata=MAY_CHANGE)
    """Stop after this many optimizer steps (0: no limit). The schedule still follows `epochs`."""
    warmup_fraction: typing.Annotated[_Below1, OrAuto] = 0.1
    """Part of all steps with rising learning rate; 'auto': a tenth, but at most 500 steps."""
    final_lr_fraction: _UpTo1 = 0.1
    """Learning rate at the end of the cosine, as a part of the peak (official settings); 1: a constant rate."""
    clip_norm: NotNegative = 1.0
    """Global norm of the dense gradients; 0 turns clipping off. Fused tables are never clipped."""
    micro_batches: AtLeast1 = 1
    """Gradient accumulation: the batch goes through the tower in this many parts, with one lookup and one step."""
    bf16: bool = False
    """GPU: autocast of the dense part. CPU: the same as ExecutionConfig.matmul_dtype = "bf16" where the CPU has bf16
    products, and nothing elsewhere."""
    eval_per_epoch: AtLeast1 = 1
    """Validations per epoch, evenly spaced."""
    best_metric: str = ""
    """Metric of `valid` that chooses the best checkpoint (largest, or smallest where it is log_loss or ne); empty: the
    first task's AUC, or MRR."""
    patience: typing.Annotated[AtLeast0, OrAuto] = dataclasses.field(default=0, metadata=MAY_CHANGE)
    """Stop after this many validations without a better one; 0 turns early stopping off; 'auto': those of a
    third of the run."""
    save_interval_steps: AtLeast0 = dataclasses.field(default=0, metadata=MAY_CHANGE)
    """Also save every this many steps; 0: only with a validation."""
    keep_last: AtLeast1 = dataclasses.field(default=2, metadata=MAY_CHANGE)
    """Newest checkpoints kept besides the best one; 2, so that one is left where the newest is damaged."""
    keep_every_hours: NotNegative = dataclasses.field(default=0.0, metadata=MAY_CHANGE)
    """Also keep, for good, one checkpoint per this many hours of wall time; 0: none."""
    async_checkpoints: bool = dataclasses.field(default=True, metadata=MAY_CHANGE)
    """Write in the background, from a copy of the state in host memory; False: training waits, without a copy."""
    checkpoint_dir: str = dataclasses.field(default="", metadata=MAY_CHANGE)
    """Folder or fsspec URL (s3://bucket/run) of the checkpoints of this run alone; empty: OUTPUT_DIR."""
    log_interval_steps: AtLeast1 = dataclasses.field(default=20, metadata=MAY_CHANGE)
    """Steps between two lines of metrics; the only steps that wait for the device."""
    collective_timeout_s: int = dataclasses.field(default=600, metadata=MAY_CHANGE)
    """A rank that waits longer for its peers fails with an error."""
    hang_timeout_s: AtLeast0 = dataclasses.field(default=300, metadata=MAY_CHANGE)
    """A rank without progress (a phase of a step, a batch of a validation, a part of a file) for so long, or four times
    so long in its first step, says where it stands and ends with status 124; 0: off. Shorter than collective_timeout_s,
    so that the rank that hangs speaks, and not only those that wait for it."""
    profile: bool = dataclasses.field(default=False, metadata=MAY_CHANGE)
    """Trace steps 10 to 12 (torch.profiler) into OUTPUT_DIR/profile, with a page of text for each rank."""
    average_fraction: typing.Annotated[_UpTo1, OrAuto] = 0.0
    """Validate, save and serve the mean of the dense weights over about this part of the steps, the last ones, because
    single batches move them at random; tables are not averaged. 0: the last weights; 'auto': a tenth."""
    mlflow_uri: str = dataclasses.field(default="", metadata=MAY_CHANGE)
    """MLflow tracking server (http://host:5000) that gets options and metrics, too; empty: none. Needs the
    extra `mlflow`. A server that is down ends no training."""
