"""Holds `RunConfig`, all options of a run, and the rules between options of different parts."""

import collections.abc
import dataclasses
import typing

from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.config.model import MODELS, ModelConfig, saved_revision
from gpsd_dist.config.tables import TablesConfig
from gpsd_dist.config.training import (
    SPARSE_OPTIMIZERS,
    DataConfig,
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)
from gpsd_dist.validation import AUTO, MAY_CHANGE, AtLeast0, check_known, checked, one_of

STRATEGIES = ("NT", "ST", "FT", "ST_SF", "FT_SF")  # arXiv:2506.03699, section 3.3
_GONE = {"ModelConfig.head_hidden": "ranking MLPs have their own widths by model; 4 x width is still the usual one"}
"""Options of older versions, and what became of them. Whoever removes one adds it."""
_Problems = collections.abc.Iterator[str]


def _folders_are_named(run: "RunConfig") -> _Problems:
    """An empty path would mean the working directory."""
    for name in ("data_dir", "output_dir"):
        if not getattr(run, name):
            yield f"{name} is empty; set --gin.{name.upper()}=PATH"


def _output_is_local(run: "RunConfig") -> _Problems:
    """TensorBoard, the lock and logs append to files, which object stores cannot do; checkpoints may go there."""
    if "://" in run.output_dir:
        yield f"OUTPUT_DIR {run.output_dir} must be a local folder; URLs: TrainConfig.checkpoint_dir"


def _a_run_starts_from_what_its_strategy_transfers(run: "RunConfig") -> _Problems:
    """NT transfers nothing, so a checkpoint would be ignored; every other strategy has nothing to transfer without."""
    if (run.strategy == "NT") != bool(run.init_checkpoint):
        return
    is_new = run.strategy == "NT"
    needed = "stay empty" if is_new else "name a run to start from: a pretraining, or an earlier finetuning"
    yield f"STRATEGY {run.strategy} with INIT_CHECKPOINT={run.init_checkpoint!r}: INIT_CHECKPOINT must {needed}"


def _warm_starts_have_a_finetuning(run: "RunConfig") -> _Problems:
    """The heads are those of a finetuning, and stand on the tower."""
    if run.finetune.warm_start and not run.transfers_tower:
        given = f"FinetuneConfig.warm_start with stage {run.stage}, strategy {run.strategy}"
        yield f"{given}: it goes on with a whole finetuned model; set STRATEGY FT, or FT_SF to keep frozen tables so"


def _only_finetuning_is_refitted(run: "RunConfig") -> _Problems:
    """A refit adds `valid` to `train`; pretraining has a split of its own."""
    if run.stage == "pretrain" and run.refit_of:
        yield f"REFIT_OF={run.refit_of!r}: pretraining does not train on `train`; leave it out"


def _frozen_dtype_needs_frozen_tables(run: "RunConfig") -> _Problems:
    """Trained tables are always float32: their updates would vanish in fewer bits."""
    if run.tables.frozen_dtype != "fp32" and not run.freezes_tables:
        given = f"frozen_dtype {run.tables.frozen_dtype} with stage {run.stage}, strategy {run.strategy}"
        yield f"{given}: nothing is frozen; leave it out, or choose ST_SF or FT_SF"


def _frozen_rows_are_of_frozen_tables(run: "RunConfig") -> _Problems:
    """New rows are the exception in a table that is frozen; they are trained, so they are float32."""
    if not run.tables.frozen_rows:
        return
    if not run.freezes_tables:
        yield f"frozen_rows with strategy {run.strategy}: the whole table is trained; choose ST_SF or FT_SF"
    others = () if run.tables.frozen_rows == AUTO else set(run.tables.frozen_rows) - set(run.tables.transfer)
    if others:
        known = list(run.tables.transfer)
        yield f"frozen_rows names {sorted(others)}, TRANSFER_TABLES has {known}: correct a name, or add the table there"
    if run.tables.frozen_dtype != "fp32":
        yield f"frozen_rows with frozen_dtype {run.tables.frozen_dtype}: new rows are trained in fp32; leave one out"
    if run.sparse.name == "lamb":
        yield "frozen_rows with sparse optimizer 'lamb', which divides by the length of an update: take another one"


def _graphs_need_bf16(run: "RunConfig") -> _Problems:
    """Only flash attention, which wants bf16, has the same kernels for every batch of a shape."""
    if run.execution.cuda_graphs and not run.train.bf16:
        yield "cuda_graphs without bf16: attention runs in length buckets, other ones in every batch"


def _graphs_take_the_batch_whole(run: "RunConfig") -> _Problems:
    """The replay for the next part writes over the gradients of the one before."""
    if run.execution.cuda_graphs and run.train.micro_batches > 1:
        yield f"cuda_graphs with micro_batches {run.train.micro_batches}: gradients of parts do not add up"


def _fsdp2_is_not_compiled(run: "RunConfig") -> _Problems:
    """A compiled tower crashes on the hooks of FSDP2."""
    if run.model.compile and run.execution.dense_parallel == "fsdp2":
        yield "compile with dense_parallel fsdp2: not built, leave one of them out"


def _optimizers_fit_their_part(run: "RunConfig") -> _Problems:
    """The dense part has AdamW alone, and tables have the optimizers that FBGEMM fuses into its backward."""
    if run.dense.name != "adamw":
        yield f"dense optimizer {run.dense.name!r}: only adamw is built"
    if run.sparse.name not in SPARSE_OPTIMIZERS:
        yield f"sparse optimizer {run.sparse.name!r} is not one of {SPARSE_OPTIMIZERS}"
    if run.sparse.peak_lr == AUTO:
        yield f"sparse peak_lr {AUTO!r}: the rate of the tables is not chosen from the data; give a number"


def _histories_fit_their_positions(run: "RunConfig") -> _Problems:
    """A position table has a row for every event and for the candidate after them; Wukong has a slot for every event.

    More events would read beyond the table, and the last slots would be lost.
    """
    longest, positions = run.data.max_history_length, run.model.max_positions
    given = f"max_history_length {longest}"
    if MODELS[run.model.name].has_position_table and longest >= positions:
        yield (
            f"{given} does not fit {run.model.name!r} with max_positions {positions}: set "
            f"--gin.ModelConfig.max_positions={longest + 11}, or a shorter MAX_HISTORY_LENGTH"
        )
    if run.model.name == "wukong" and longest > positions:
        slots = "wukong has a slot for every event; raise --gin.ModelConfig.max_positions"
        yield f"{given} with max_positions {positions}: {slots}"


RULES = (
    _folders_are_named,
    _output_is_local,
    _a_run_starts_from_what_its_strategy_transfers,
    _warm_starts_have_a_finetuning,
    _only_finetuning_is_refitted,
    _frozen_dtype_needs_frozen_tables,
    _frozen_rows_are_of_frozen_tables,
    _graphs_need_bf16,
    _graphs_take_the_batch_whole,
    _fsdp2_is_not_compiled,
    _optimizers_fit_their_part,
    _histories_fit_their_positions,
)
"""Every rule between options of different parts. Those that need the data set are in `gpsd_dist.preflight`."""


@checked(rules=RULES)
class RunConfig:
    """Holds everything that `train` needs to know."""

    stage: str
    """pretrain | finetune, or another stage that `gpsd_dist.stages.registry` lists."""
    data_dir: str = dataclasses.field(metadata=MAY_CHANGE)
    """Folder that `data_pipeline.build` wrote, or one of its versions."""
    output_dir: str = dataclasses.field(metadata=MAY_CHANGE)
    """Folder of the run; the same command on one that is there goes on from its last checkpoint."""
    strategy: typing.Annotated[str, one_of(STRATEGIES)] = "NT"
    """NT | ST | FT | ST_SF | FT_SF; pretraining goes on from an earlier one by any but NT."""
    init_checkpoint: str = dataclasses.field(default="", metadata=MAY_CHANGE)
    """Run folder (its best checkpoint is used) or checkpoint folder to start from: a pretraining, or the finetuning
    that a later build of the data goes on from; pretraining goes on from a pretraining. Empty for NT alone."""
    refit_of: str = ""
    """Finetuning only: a finished run folder of the same options. Trains on `train` and `valid` for as many epochs as
    that run took to its best validation; nothing is left to validate on, and the last checkpoint is the result."""
    seed: AtLeast0 = 0
    """Seed of initial weights, order of the data, negatives and dropout."""
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

    @property
    def transfers_tower(self) -> bool:
        """Says whether the tower starts from the checkpoint too (full transfer)."""
        return self.strategy in ("FT", "FT_SF")

    @property
    def training_split(self) -> str:
        """Names the split, or both, that the run trains on."""
        return "pretrain" if self.stage == "pretrain" else "train+valid" if self.refit_of else "train"

    @property
    def freezes_tables(self) -> bool:
        """Says whether transferred tables get no optimizer and keep their bytes (sparse freezing)."""
        return self.strategy in ("ST_SF", "FT_SF")

    @property
    def frozen_tables(self) -> tuple[str, ...]:
        """Names the tables that keep their bytes; none of them while `frozen_rows` is 'auto'."""
        partly = self.tables.transfer if self.tables.frozen_rows == AUTO else self.tables.frozen_rows
        return tuple(name for name in self.tables.transfer if name not in partly) if self.freezes_tables else ()


GIN_CLASSES = (
    *(DataConfig, TablesConfig, IdsConfig, ModelConfig, PretrainConfig),
    *(FinetuneConfig, OptimizerConfig, TrainConfig, ExecutionConfig, RunConfig),
)


def run_config_from_dict(raw: dict[str, typing.Any]) -> RunConfig:
    """Reads `dataclasses.asdict(run)` back after a trip through JSON; an option that is missing has its default.

    The revision of a model is that of the program that saved it. ValueError names what does not fit, UnknownOptions
    what is of another version of the program.
    """
    hints = typing.get_type_hints(RunConfig)
    check_known(RunConfig, raw, _GONE)
    model, tables = raw.get("model"), raw.get("tables", {})
    if isinstance(model, dict) and isinstance(tables, dict) and "revision" not in model:
        width = tables.get("embedding_dim", TablesConfig.embedding_dim)
        raw = raw | {"model": model | {"revision": saved_revision(model, width)}}
    parts = {n: value for n, value in raw.items() if dataclasses.is_dataclass(hints[n]) and isinstance(value, dict)}
    try:
        return RunConfig(**raw | {name: hints[name](**value) for name, value in parts.items()})
    except ValueError as error:
        raise ValueError(f"the saved run configuration does not fit this version: {error}") from error
