"""Holds the options of a run: data, stages, optimizers, loop; and `RunConfig`, which has all of them."""

import dataclasses
import typing

from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.config.model import POSITION_TABLE_MODELS, ModelConfig
from gpsd_dist.config.tables import TablesConfig
from gpsd_dist.validation import below, check_known, check_types, raise_all

STRATEGIES = ("NT", "ST", "FT", "ST_SF", "FT_SF")  # arXiv:2506.03699, section 3.3
NEGATIVES_PER = ("group", "request", "position")
SPARSE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb")
CUDA_ONLY_SPARSE_OPTIMIZERS = ("adam", "partial_rowwise_adam", "lamb")  # no fbgemm CPU kernel
_GONE = {"ModelConfig.head_hidden": "ranking MLPs have their own widths by model; 4 x width is still the usual one"}
"""Options of older versions, and what became of them. Whoever removes one adds it."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Reading and batching."""

    max_history_length: int = 50
    """Most recent history tokens that the model sees. 50 on Amazon, 200 on Taobao (official settings)."""
    global_batch_rows: int = 512
    """Requests per optimizer step over all ranks; 0 if `global_batch_tokens` is used."""
    global_batch_tokens: int = 0
    """History tokens per optimizer step over all ranks; 0 if `global_batch_rows` is used."""
    eval_batch_rows_per_rank: int = 1024
    """Requests per evaluation batch of one rank."""
    num_data_shards: int = 16
    """Fixed parts of an epoch that ranks share out; at least the world size, and fixed for the life of a run."""
    num_threads: int = 1
    """Threads per rank that read and collate."""
    prefetch: int = 2
    """Batches per thread that may wait."""

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        if (self.global_batch_rows > 0) == (self.global_batch_tokens > 0):
            given = f"global_batch_rows={self.global_batch_rows}, global_batch_tokens={self.global_batch_tokens}"
            problems.append(f"{given}: set exactly one of them above 0")
        for name in ("max_history_length", "eval_batch_rows_per_rank", "num_data_shards", "num_threads", "prefetch"):
            problems += below(self, name, 1)
        raise_all(self, problems)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Generative objective: next item by sampled softmax, plus full softmax over small attributes of the item."""

    temperature: float = 0.05
    """Cosine similarity is divided by this (official settings)."""
    negatives_per: str = "group"
    """What shares a set of negatives. group: a part of the rank's positions; request: one history (official GPSD,
    12-20x the cost); position: nothing, every position draws its own (HSTU and SASRec, with num_negatives = 128)."""
    num_negative_groups: int = 8
    """G sets per rank and step; of negatives_per = group alone."""
    num_negatives: int = 1024
    """N negatives per set, uniform over the known items, with replacement."""
    auxiliary: tuple[str, ...] = ()
    """Token features (not bags) that are predicted too, e.g. ("category",)."""
    auxiliary_weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        if self.negatives_per not in NEGATIVES_PER:
            problems.append(f"negatives_per {self.negatives_per!r} is not one of {NEGATIVES_PER}")
        if self.num_negative_groups < 1:
            given = f"num_negative_groups {self.num_negative_groups}"
            problems.append(f"{given} must be >= 1; for one set per request set negatives_per='request'")
        problems += below(self, "num_negatives", 1)
        if self.temperature <= 0:
            problems.append(f"temperature {self.temperature} must be > 0")
        raise_all(self, problems)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Discriminative objective."""

    task_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Task -> weight of its loss; tasks not named weigh 1. A weight of 0 leaves the task's head out."""
    esmm: bool = False
    """Train a task given another one on P(given) x P(task | given) over all candidates (arXiv:1804.07931)
    instead of on the candidates where the other label is 1."""
    next_behaviour_weight: float = 0.0
    """dien, dmin: weight of the auxiliary loss of arXiv:1809.03672, which predicts each next history token from the
    state before it, against a random one of the batch. 0, as in the official variants: without."""

    def __post_init__(self) -> None:
        check_types(self)
        problems = [f"weight of task {t!r} is {w}, must be >= 0" for t, w in self.task_weights.items() if w < 0]
        problems += below(self, "next_behaviour_weight", 0)
        raise_all(self, problems)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer; there are two, `dense` and `sparse`."""

    name: str
    """dense: adamw. sparse: one of SPARSE_OPTIMIZERS (the Adam family and LAMB need CUDA)."""
    peak_lr: float
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        if self.name not in ("adamw", *SPARSE_OPTIMIZERS):
            problems.append(f"name {self.name!r} is not one of {('adamw', *SPARSE_OPTIMIZERS)}")
        for name in ("peak_lr", "eps", "weight_decay"):
            problems += below(self, name, 0)
        raise_all(self, problems)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: int = 10
    """Passes over the training split; also the length of the cosine."""
    max_steps: int = 0
    """Stop after this many optimizer steps (0: no limit). The schedule still follows `epochs`."""
    warmup_fraction: float = 0.1
    """Part of all steps with rising learning rate."""
    final_lr_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a part of the peak (official settings); 1: a constant rate."""
    clip_norm: float = 1.0
    """Global norm of the dense gradients; 0 turns clipping off. Fused tables are never clipped."""
    micro_batches: int = 1
    """Gradient accumulation: the batch goes through the tower in this many parts, with one lookup and one step."""
    bf16: bool = False
    """Autocast of the dense part. Slower on CPU at width 64 (0.56x), about even at 256."""
    eval_per_epoch: int = 1
    """Validations per epoch, evenly spaced."""
    best_metric: str = ""
    """Metric of `valid` that chooses the best checkpoint (larger is better); empty: the first task's AUC, or MRR."""
    patience: int = 0
    """Stop after this many validations without a better one; 0 turns early stopping off."""
    save_interval_steps: int = 0
    """Also save every this many steps; 0: only with a validation."""
    keep_last: int = 2
    """Newest checkpoints kept besides the best one; 2, so that one is left where the newest is damaged."""
    keep_every_hours: float = 0.0
    """Also keep, for good, one checkpoint per this many hours of wall time; 0: none."""
    async_checkpoints: bool = True
    """Write in the background, from a copy of the state in host memory; False: training waits, without a copy."""
    checkpoint_dir: str = ""
    """Folder or fsspec URL (s3://bucket/run) of the checkpoints of this run alone; empty: OUTPUT_DIR."""
    log_interval_steps: int = 20
    """Steps between two lines of metrics; the only steps that wait for the device."""
    collective_timeout_s: int = 600
    """A rank that waits longer for its peers fails with an error."""
    hang_timeout_s: int = 300
    """A rank without progress (a phase of a step, a batch of a validation, a part of a file) for so long, or four times
    so long in its first step, says where it stands and ends with status 124; 0: off. Shorter than collective_timeout_s,
    so that the rank that hangs speaks, and not only those that wait for it."""
    profile: bool = False
    """Trace steps 10 to 12 (torch.profiler) into OUTPUT_DIR/profile, with a page of text for each rank."""

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        for name in ("epochs", "micro_batches", "eval_per_epoch", "keep_last", "log_interval_steps"):
            problems += below(self, name, 1)
        for name in ("max_steps", "clip_norm", "patience", "save_interval_steps", "keep_every_hours", "hang_timeout_s"):
            problems += below(self, name, 0)
        if not 0 <= self.warmup_fraction < 1:
            problems.append(f"warmup_fraction {self.warmup_fraction} must be in [0, 1)")
        if not 0 <= self.final_lr_fraction <= 1:
            problems.append(f"final_lr_fraction {self.final_lr_fraction} must be in [0, 1]")
        raise_all(self, problems)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run: everything that `train` needs to know."""

    stage: str
    """pretrain | finetune: `gpsd_dist.stages.registry`, which is where a name is checked."""
    data_dir: str
    output_dir: str
    strategy: str = "NT"
    """Finetuning only: NT | ST | FT | ST_SF | FT_SF"""
    init_checkpoint: str = ""
    """Run folder (its best checkpoint is used) or checkpoint folder to start from: a pretraining, or the finetuning
    that a later build of the data goes on from. Needed unless strategy is NT."""
    refit_of: str = ""
    """Finetuning only: a finished run folder of the same options. Trains on `train` and `valid` for as many epochs as
    that run took to its best validation; nothing is left to validate on, and the last checkpoint is the result."""
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tables: TablesConfig = dataclasses.field(default_factory=TablesConfig)
    ids: IdsConfig = dataclasses.field(default_factory=IdsConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    dense: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig("adamw", 5e-3, weight_decay=0.1))
    sparse: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig("rowwise_adagrad", 0.1))
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        if self.strategy not in STRATEGIES:
            problems.append(f"STRATEGY {self.strategy!r} is not one of {STRATEGIES}")
        if self.stage == "finetune" and (self.strategy == "NT") == bool(self.init_checkpoint):
            needed = (
                "must stay empty"
                if self.strategy == "NT"
                else "must name a run to start from: a pretraining, or an earlier finetuning"
            )
            given = f"STRATEGY {self.strategy} with INIT_CHECKPOINT={self.init_checkpoint!r}"
            problems.append(f"{given}: INIT_CHECKPOINT {needed}")
        if self.stage == "pretrain" and (self.strategy != "NT" or self.init_checkpoint):
            problems.append("pretraining starts from random weights: leave out STRATEGY and INIT_CHECKPOINT")
        if self.stage == "pretrain" and self.refit_of:
            problems.append(f"REFIT_OF={self.refit_of!r}: pretraining does not train on `train`; leave it out")
        if self.tables.frozen_dtype != "fp32" and not self.freezes_tables:
            given = f"frozen_dtype {self.tables.frozen_dtype} with stage {self.stage}, strategy {self.strategy}"
            problems.append(f"{given}: nothing is frozen; leave it out, or choose ST_SF or FT_SF")
        if self.execution.cuda_graphs and not self.train.bf16:
            problems.append("cuda_graphs without bf16: attention runs in length buckets, other ones in every batch")
        if self.execution.cuda_graphs and self.train.micro_batches > 1:  # the next replay writes over the gradients
            problems.append(
                f"cuda_graphs with micro_batches {self.train.micro_batches}: gradients of parts do not add up"
            )
        if self.model.compile and self.execution.dense_parallel == "fsdp2":  # a compiled tower crashes on its hooks
            problems.append("compile with dense_parallel fsdp2: not built, leave one of them out")
        if self.dense.name != "adamw":
            problems.append(f"dense optimizer {self.dense.name!r}: only adamw is built")
        if self.sparse.name not in SPARSE_OPTIMIZERS:
            problems.append(f"sparse optimizer {self.sparse.name!r} is not one of {SPARSE_OPTIMIZERS}")
        if self.model.name == "wukong" and self.data.max_history_length > self.model.max_positions:
            given = f"max_history_length {self.data.max_history_length} with max_positions {self.model.max_positions}"
            problems.append(f"{given}: wukong has a slot for every event; raise --gin.ModelConfig.max_positions")
        for name in ("data_dir", "output_dir"):
            if not getattr(self, name):
                problems.append(f"{name} is empty; set --gin.{name.upper()}=PATH")
        if "://" in self.output_dir:
            problems.append(f"OUTPUT_DIR {self.output_dir} must be a local folder; URLs: TrainConfig.checkpoint_dir")
        longest, positions = self.data.max_history_length, self.model.max_positions
        if self.model.name in POSITION_TABLE_MODELS and longest >= positions:  # a candidate takes one more
            problems.append(
                f"max_history_length {longest} does not fit {self.model.name!r} with max_positions {positions}: set "
                f"--gin.ModelConfig.max_positions={longest + 11}, or a shorter MAX_HISTORY_LENGTH"
            )
        raise_all(self, problems)

    @property
    def transfers_tower(self) -> bool:
        """Full transfer: the tower starts from the checkpoint too."""
        return self.strategy in ("FT", "FT_SF")

    @property
    def training_split(self) -> str:
        """What is trained on."""
        return "pretrain" if self.stage == "pretrain" else "train+valid" if self.refit_of else "train"

    @property
    def freezes_tables(self) -> bool:
        """Sparse freezing: transferred tables get no optimizer and keep their bytes."""
        return self.strategy in ("ST_SF", "FT_SF")


_PARTS = (
    DataConfig,
    TablesConfig,
    IdsConfig,
    ModelConfig,
    PretrainConfig,
    FinetuneConfig,
    OptimizerConfig,
    TrainConfig,
)
GIN_CLASSES = (*_PARTS, ExecutionConfig, RunConfig)


def run_config_from_dict(raw: dict[str, typing.Any]) -> RunConfig:
    """The inverse of `dataclasses.asdict(run)` after a trip through JSON. ValueError names what does not fit.

    UnknownOptions if some are of another version of the program.
    """
    hints = typing.get_type_hints(RunConfig)
    check_known(RunConfig, raw, _GONE)
    parts = {n: value for n, value in raw.items() if dataclasses.is_dataclass(hints[n]) and isinstance(value, dict)}
    try:
        return RunConfig(**raw | {name: hints[name](**value) for name, value in parts.items()})
    except TypeError as error:
        raise ValueError(f"the saved run configuration does not fit this version: {error}") from error
