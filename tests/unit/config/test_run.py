import dataclasses
import itertools
import json
import pathlib
import pickle
import typing

import pytest

from gpsd_dist import config
from gpsd_dist.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    TablesConfig,
    TrainConfig,
    run_config_from_dict,
)
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.config.ids import IdsConfig


def make_run(**options):
    return RunConfig(**({"stage": "pretrain", "data_dir": "d", "output_dir": "o"} | options))


def make_optimizer(**options):
    return OptimizerConfig(**({"name": "adamw", "peak_lr": 0.1} | options))


MAKERS = {cls: cls for cls in config.GIN_CLASSES} | {RunConfig: make_run, OptimizerConfig: make_optimizer}

GRAPHS: dict[str, typing.Any] = {"cuda_graphs": True, "token_multiple": 64}

INVALID = [
    (RunConfig, {"seed": -1}, "seed -1 must be >= 0"),
    (DataConfig, {"global_batch_rows": 0}, "set exactly one"),
    (DataConfig, {"cache_gib": -1.0}, "cache_gib -1.0 must be >= 0"),
    (DataConfig, {"global_batch_tokens": 100}, "set exactly one"),
    (DataConfig, {"global_batch_rows": -1, "global_batch_tokens": 0}, "set exactly one"),
    *[
        (DataConfig, {name: 0}, f"{name} 0 must be >= 1")
        for name in ("max_history_length", "eval_batch_rows_per_rank", "num_data_shards", "num_threads", "prefetch")
    ],
    (ExecutionConfig, {"exchange_forward": "int8"}, "exchange_forward 'int8' is not one of ('fp32', 'fp16', 'bf16')"),
    (ExecutionConfig, {"exchange_backward": "half"}, "exchange_backward 'half'"),
    (ExecutionConfig, {"token_multiple": -1}, "token_multiple -1 must be >= 0"),
    (ExecutionConfig, {"cuda_graphs": True}, "cuda_graphs needs few shapes: set token_multiple"),
    (ExecutionConfig, GRAPHS | {"activation_checkpointing": True}, "cuda_graphs is for small towers"),
    (ExecutionConfig, GRAPHS | {"dense_parallel": "fsdp2"}, "cuda_graphs is for small towers"),
    (ExecutionConfig, {"dense_parallel": "zero3"}, "dense_parallel 'zero3'"),
    (ExecutionConfig, {"pipeline": "auto"}, "pipeline 'auto' is not one of ('plain', 'sparse_dist')"),
    (TablesConfig, {"embedding_dim": 0}, "embedding_dim 0 must be >= 1"),
    (TablesConfig, {"small_table_max_rows": -1}, "small_table_max_rows"),
    (TablesConfig, {"sharding": {"item": "diagonal"}}, "sharding['item'] 'diagonal' is not one of ('row_wise'"),
    *[
        (ModelConfig, {name: 0}, f"{name} 0 must be >= 1")
        for name in ("layers", "width", "heads", "context_dim", "max_positions")
    ],
    (ModelConfig, {"revision": 4}, "revision 4 must be <= 3"),
    *[(ModelConfig, {name: -1}, f"{name} -1 must be >= 0") for name in ("init_std", "head_width", "ffn_width")],
    (ModelConfig, {"width": 36, "heads": 4}, "multiple of 2 x heads = 8"),
    (ModelConfig, {"name": "hstu", "width": 50, "heads": 4}, "multiple of heads = 4"),
    (RunConfig, {"model": ModelConfig("hstu", max_positions=50)}, "--gin.ModelConfig.max_positions=61"),
    (RunConfig, {"model": ModelConfig("sasrec", max_positions=50)}, "max_history_length 50 does not fit 'sasrec'"),
    (ModelConfig, {"dropout": 1.0}, "dropout"),
    (ModelConfig, {"dropout": -0.1}, "dropout"),
    (PretrainConfig, {"num_negative_groups": 0}, "num_negative_groups 0"),
    (PretrainConfig, {"num_negative_groups": -1}, "negatives_per='request'"),
    (PretrainConfig, {"negatives_per": "batch"}, "'batch' is not one of ('group', 'request', 'position')"),
    (PretrainConfig, {"num_negatives": 0}, "num_negatives"),
    (PretrainConfig, {"temperature": 0}, "temperature"),
    (PretrainConfig, {"temperature": -0.1}, "temperature"),
    (FinetuneConfig, {"task_weights": {"click": -1.0}}, "task_weights['click'] -1.0 must be >= 0"),
    (FinetuneConfig, {"next_behaviour_weight": -0.5}, "next_behaviour_weight -0.5 must be >= 0"),
    (OptimizerConfig, {"name": "adamax"}, "'adamax' is not one of"),
    *[(OptimizerConfig, {name: -1.0}, f"{name} -1.0 must be >= 0") for name in ("peak_lr", "eps", "weight_decay")],
    *[
        (TrainConfig, {name: 0}, f"{name} 0 must be >= 1")
        for name in ("epochs", "micro_batches", "eval_per_epoch", "keep_last", "log_interval_steps")
    ],
    *[
        (TrainConfig, {name: -1}, f"{name} -1 must be >= 0")
        for name in ("max_steps", "clip_norm", "patience", "save_interval_steps")
    ],
    *[
        (TrainConfig, {name: value}, f"{name} {value} must be {'>= 0' if value < 0 else '<'}")
        for name, value in itertools.product(("warmup_fraction", "final_lr_fraction"), (-0.1, 1.5))
    ],
    (TrainConfig, {"warmup_fraction": 1.0}, "warmup_fraction 1.0 must be < 1"),
    (RunConfig, {"stage": "finetune", "strategy": "SF"}, "strategy 'SF' is not one of"),
    (RunConfig, {"data_dir": ""}, "--gin.DATA_DIR=PATH"),
    (RunConfig, {"output_dir": ""}, "--gin.OUTPUT_DIR=PATH"),
    (RunConfig, {"dense": OptimizerConfig("sgd", 0.1)}, "only adamw is built"),
    (RunConfig, {"sparse": OptimizerConfig("adamw", 0.1)}, "sparse optimizer 'adamw'"),
]


@pytest.mark.parametrize(("cls", "options", "words"), INVALID, ids=str)
def test_invalid_values_are_named(cls, options, words):
    with pytest.raises(ValueError) as caught:
        MAKERS[cls](**options)
    assert words in str(caught.value) and str(caught.value).startswith(f"{cls.__name__}: ")


WRONG = {
    "int": [1.5, "1", True, None],
    "float": ["0.1", True, None, (0.1,)],
    "str": [1, None, ("a",)],
    "bool": [1, "True", None],
    "tuple": ["item", ("item", 3), 5, None, {"item": 1}],
    "dict": ["a", {"a": []}, {1: "row_wise"}, ("a",), None],
    "other": [1, "x", None, {}],
}


def kind_of(hint):
    text = getattr(hint, "__name__", str(hint))
    return next((kind for kind in WRONG if text.startswith(kind)), "other")


@pytest.mark.parametrize("cls", config.GIN_CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_checks_its_type(cls):

    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for value in WRONG[kind_of(hints[field.name])]:
            with pytest.raises(ValueError, match=f"{cls.__name__}: .*{field.name} is .*expected"):
                MAKERS[cls](**{field.name: value})


@pytest.mark.parametrize("cls", config.GIN_CLASSES, ids=lambda cls: cls.__name__)
def test_options_are_frozen_and_documented(cls):
    made = MAKERS[cls]()
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))


def test_all_problems_of_a_part_come_at_once():
    """Types, bounds and choices together; rules between options too, where all types are right."""
    with pytest.raises(ValueError) as caught:
        TrainConfig(epochs=0, patience=-1, warmup_fraction=2.0, bf16=1)
    bounds = "epochs 0 must be >= 1; warmup_fraction 2.0 must be < 1"
    assert str(caught.value) == f"TrainConfig: {bounds}; bf16 is 1, expected bool; patience -1 must be >= 0"
    with pytest.raises(ValueError) as caught:
        DataConfig(10, 0, prefetch=0)
    zero = "global_batch_rows=0, global_batch_tokens=0: set exactly one of them above 0"
    assert str(caught.value) == f"DataConfig: prefetch 0 must be >= 1; {zero}"
    with pytest.raises(ValueError) as caught:
        make_run(data_dir="", output_dir="s3://b", strategy="STSF", dense=OptimizerConfig("sgd", 1))
    assert all(w in str(caught.value) for w in ("data_dir is empty", "s3://b must", "did you mean", "only adamw"))


def test_a_misspelt_option_is_told_what_was_meant():
    with pytest.raises(ValueError, match=r"^TrainConfig: epoch is no option; did you mean 'epochs'\?$"):
        TrainConfig(epoch=3)
    with pytest.raises(ValueError, match=r"^OptimizerConfig: name is missing; peak_lr is missing$"):
        OptimizerConfig()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x\ny", ["a" * 999] * 999, 10**400])
def test_no_message_is_pydantics_own(value):
    with pytest.raises(ValueError) as caught:
        TrainConfig(clip_norm=value)
    assert type(caught.value) is ValueError and caught.value.__cause__ is None
    text = str(caught.value)
    assert text.startswith("TrainConfig: clip_norm is ") and "\n" not in text and "pydantic" not in text
    assert len(text) < 300


def test_options_are_dataclasses_like_any_other():
    run = full_run()
    assert pickle.loads(pickle.dumps(run)) == run
    assert dataclasses.replace(run.train, epochs=7).epochs == 7
    with pytest.raises(ValueError, match="TrainConfig: epochs 0 must be >= 1"):
        dataclasses.replace(run.train, epochs=0)
    assert {field.name: field.default for field in dataclasses.fields(ModelConfig)}["layers"] == ModelConfig.layers == 4
    mine = {"item": "row_wise"}
    tables = TablesConfig(sharding=mine)
    mine["item"] = "diagonal"
    assert tables.sharding == {"item": "row_wise"}


MAY_CHANGE = {
    "RunConfig": {"data_dir", "output_dir", "init_checkpoint"},
    "DataConfig": {"num_threads", "prefetch", "eval_batch_rows_per_rank", "cache_dir", "cache_gib"},
    "TablesConfig": {"sharding"},
    "ExecutionConfig": {
        *("activation_checkpointing", "pipeline", "dense_parallel", "token_multiple", "cuda_graphs"),
        "matmul_dtype",  # decides about numbers, but a run may have to go on where a CPU has no bf16 products
    },
    "TrainConfig": {
        *("max_steps", "patience", "keep_last", "keep_every_hours", "async_checkpoints", "checkpoint_dir", "profile"),
        *("log_interval_steps", "save_interval_steps", "collective_timeout_s", "hang_timeout_s", "mlflow_uri"),
    },
}


@pytest.mark.parametrize("cls", config.GIN_CLASSES, ids=lambda cls: cls.__name__)
def test_options_that_may_change_on_resume(cls):
    """Every other one decides about numbers, so a new one may not change unless it is named here too."""
    found = {field.name for field in dataclasses.fields(cls) if field.metadata.get("may_change_on_resume")}
    assert found == MAY_CHANGE.get(cls.__name__, set())


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_histories_may_be_as_long_as_positions_less_one(name):
    """A candidate takes the position after the last event."""
    run = make_run(model=ModelConfig(name, width=50, heads=1, max_positions=51))
    assert run.data.max_history_length == 50


@pytest.mark.parametrize(("width", "stored"), [(1, 4), (4, 4), (50, 52), (52, 52), (61, 64)])
def test_stored_width_is_the_next_multiple_of_4(width, stored):
    assert TablesConfig(embedding_dim=width).stored_dim == stored


def test_lists_become_tuples_and_ints_pass_as_floats():
    assert PretrainConfig(auxiliary=["category"]).auxiliary == ("category",)
    assert TrainConfig(clip_norm=2).clip_norm == 2


@pytest.mark.parametrize(("name", "longest", "fits"), [("wukong", 30, True), ("wukong", 31, False), ("din", 31, True)])
def test_histories_must_fit_into_the_slots_of_a_model_that_has_them(name, longest, fits):
    options = {"data": DataConfig(max_history_length=longest), "model": ModelConfig(name=name, max_positions=30)}
    if fits:
        assert make_run(**options).model.max_positions == 30
    else:
        with pytest.raises(ValueError, match="max_history_length 31 with max_positions 30"):
            make_run(**options)


@pytest.mark.parametrize("strategy", config.STRATEGIES)
@pytest.mark.parametrize("init_checkpoint", ["", "runs/p"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_needs_a_checkpoint_unless_nothing_is_transferred(stage, strategy, init_checkpoint):
    options = {"stage": stage, "strategy": strategy, "init_checkpoint": init_checkpoint}
    if (strategy == "NT") == (init_checkpoint == ""):
        run = make_run(**options)
        assert run.transfers_tower == (strategy in ("FT", "FT_SF"))
        assert run.freezes_tables == (strategy in ("ST_SF", "FT_SF"))
    else:
        with pytest.raises(ValueError, match=f"STRATEGY {strategy}.*INIT_CHECKPOINT must"):
            make_run(**options)


def test_new_rows_are_trained_in_frozen_tables_of_float32():
    options = {"stage": "finetune", "strategy": "ST_SF", "init_checkpoint": "runs/p"}
    tables = TablesConfig(transfer=("item", "tag"), frozen_rows={"item": 9})
    assert make_run(**options, tables=tables).frozen_tables == ("tag",)
    assert make_run(**options, tables=dataclasses.replace(tables, frozen_rows="auto")).frozen_tables == ()
    wrong = {
        "frozen_rows with strategy ST: the whole table is trained": {"strategy": "ST"},
        "frozen_rows with frozen_dtype fp16": {"tables": dataclasses.replace(tables, frozen_dtype="fp16")},
        "frozen_rows with sparse optimizer 'lamb'": {"sparse": OptimizerConfig("lamb", 0.1)},
        r"frozen_rows names \['itme'\], TRANSFER_TABLES has \['item', 'tag'\]": {
            "tables": dataclasses.replace(tables, frozen_rows={"itme": 9})
        },
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            make_run(**options | {"tables": tables} | changes)


@pytest.mark.parametrize("strategy", config.STRATEGIES)
def test_frozen_rows_need_a_strategy_that_freezes(strategy):
    options = {"stage": "finetune", "strategy": strategy, "tables": TablesConfig(frozen_dtype="fp16")}
    options["init_checkpoint"] = "" if strategy == "NT" else "runs/p"
    if strategy.endswith("SF"):
        assert make_run(**options).tables.frozen_value_bytes == 2
    else:
        with pytest.raises(ValueError, match=f"frozen_dtype fp16 with stage finetune, strategy {strategy}: nothing is"):
            make_run(**options)


def test_pretraining_is_not_refitted():
    assert make_run(stage="finetune", refit_of="runs/a").training_split == "train+valid"
    with pytest.raises(ValueError, match="REFIT_OF='runs/a': pretraining does not train on `train`"):
        make_run(refit_of="runs/a")


def full_run():
    """A value other than the default in every field, but for those that do not go with others: see `graphs_run`."""
    return RunConfig(
        stage="finetune",
        data_dir="data/x",
        output_dir="runs/x",
        strategy="FT_SF",
        init_checkpoint="runs/p",
        seed=7,
        data=DataConfig(7, 0, 640, 9, 8, 3, 4, "cache", 0.5, 0.02),
        tables=TablesConfig(32, 9, {"item": "table_wise"}, ("item", "tag"), 0.1, "fp16", "unknown"),
        ids=IdsConfig({"item": "managed"}, {"item": 50}, 5, "lru"),
        model=ModelConfig("hstu", 2, 32, 2, 0.1, 0.05, 8, False, 99, 5, 7, False, 1, "by_width", True, True, True),
        pretrain=PretrainConfig(0.1, "position", 3, 5, 0.2, True, True, (3.0, 14.0), ("category", "brand"), 0.5),
        finetune=FinetuneConfig({"click": 0.5, "buy": 2}, True, True, 0.5, True, "floor"),
        dense=OptimizerConfig("adamw", 0.2, 0.8, 0.7, 1e-6, 0.3),
        sparse=OptimizerConfig("sgd", 0.3, 0.5, 0.6, 1e-5, 0.0),
        train=TrainConfig(
            *(3, 9, 0.2, 0.3, 0.5, 2, True, 3, "click/auc", 4, 5, 6, 0.5, False, "s3://b", 7, 8, 10, True, 0.6),
            mlflow_uri="http://m",
        ),
        execution=ExecutionConfig(True, "bf16", "fp16", "sparse_dist", "fsdp2", 64, False, "bf16"),
    )


def graphs_run():
    options = {"strategy": "FT_SF", "init_checkpoint": "runs/p", "tables": TablesConfig(frozen_rows={"item": 9})}
    ways = {"execution": ExecutionConfig(**GRAPHS), "train": TrainConfig(bf16=True)}
    return make_run(model=ModelConfig(compile=True), **ways, **options)


def test_round_trip_through_json():
    for run in (full_run(), graphs_run(), make_run()):
        assert run_config_from_dict(json.loads(json.dumps(dataclasses.asdict(run)))) == run


def test_the_round_trip_covers_every_field():
    full, graphs, plain = (dataclasses.asdict(run) for run in (full_run(), graphs_run(), make_run()))
    same = {
        f"{part}.{name}"
        for part, values in full.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value == graphs[part][name] == plain[part][name]
    }
    assert same <= {"dense.name", "sparse.weight_decay"}


ASSET = pathlib.Path(__file__).resolve().parents[2] / "assets" / "run_14e4532"


@pytest.mark.parametrize("name", ["pretrain", "st_sf"])
def test_a_run_of_commit_14e4532_is_read(name):
    raw = json.loads((ASSET / name / "run_config.json").read_text())
    run = run_config_from_dict(raw)
    # Tower and tables are equally wide.
    raw["model"] |= {"revision": 2, "parametrization": "official", "matches": False, "number_buckets": False}
    raw["model"] |= {"bag_matches": False}
    raw["finetune"] |= {"weighted_metrics": False, "warm_start": False, "offset": ""}
    raw["train"] |= {"average_fraction": 0.0, "mlflow_uri": ""}
    raw["execution"] |= {"matmul_dtype": "auto"}
    raw["pretrain"] |= {"popular_share": 0.0, "log_q": False, "item_bias": False, "recent_days": []}
    raw["tables"] |= {"new_rows": "attributes", "frozen_rows": {}}
    raw["data"] |= {"cache_dir": "", "cache_gib": 16.0, "unknown_rate": 0.0}
    assert json.loads(json.dumps(dataclasses.asdict(run))) == raw
    assert run.stage == ("pretrain" if name == "pretrain" else "finetune") and run.model.width == raw["model"]["width"]


def test_an_option_that_a_saved_run_lacks_has_its_default():
    raw = json.loads(json.dumps(dataclasses.asdict(full_run())))
    for field in dataclasses.fields(RunConfig):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            continue
        if field.name not in ("strategy", "init_checkpoint", "tables"):  # which need one another
            older = run_config_from_dict({name: value for name, value in raw.items() if name != field.name})
            assert older == dataclasses.replace(full_run(), **{field.name: getattr(make_run(), field.name)})
    for part in ("data", "model", "pretrain", "train", "execution"):
        for option in raw[part]:
            needed = ("data", "global_batch_rows"), ("data", "global_batch_tokens"), ("pretrain", "log_q")
            if (part, option) in needed or option == "revision":  # by another option; see saved_revision
                continue
            lacking = raw | {part: {name: value for name, value in raw[part].items() if name != option}}
            default = getattr(getattr(make_run(), part), option)
            assert getattr(getattr(run_config_from_dict(lacking), part), option) == default


def test_a_wrong_value_given_by_its_place_is_named():
    with pytest.raises(ValueError, match="width is '64', expected int"):
        ModelConfig("hstu", 2, "64")


def saved(**changed):
    return dataclasses.asdict(make_run()) | changed


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (saved(colour="red"), "colour"),
        (saved(model={"layres": 3}), "layres"),
        (saved(model={"layers": 0}), "layers 0"),
        (saved(model=5), "model is 5"),
        (saved(train=None), "train is None"),
        ({"stage": "pretrain"}, "data_dir"),
        ({}, "stage"),
    ],
    ids=str,
)
def test_a_saved_run_that_does_not_fit_names_the_field(raw, words):
    with pytest.raises(ValueError, match=words):
        run_config_from_dict(raw)


def test_every_gin_class_has_its_own_name():
    names = [cls.__name__ for cls in config.GIN_CLASSES]
    assert len(set(names)) == len(names)
    used = {field.type for field in dataclasses.fields(RunConfig)} & set(config.GIN_CLASSES)
    assert used == set(config.GIN_CLASSES) - {RunConfig}


def test_int8_rows_of_earlier_versions_are_refused_with_the_commit_that_reads_them():
    with pytest.raises(ValueError, match=r"frozen_dtype 'int8' is not built any more.*fp16.*commit 14e4532"):
        TablesConfig(frozen_dtype="int8")


@pytest.mark.parametrize(
    ("execution", "other", "words"),
    [
        (GRAPHS, {"train": TrainConfig()}, "cuda_graphs without bf16"),
        (GRAPHS, {"train": TrainConfig(bf16=True, micro_batches=2)}, "cuda_graphs with micro_batches 2"),
        ({"dense_parallel": "fsdp2"}, {"model": ModelConfig(compile=True)}, "compile with dense_parallel fsdp2"),
    ],
)
def test_ways_to_run_that_do_not_go_together(execution, other, words):
    with pytest.raises(ValueError, match=words):
        make_run(execution=ExecutionConfig(**execution), **other)
    assert make_run(execution=ExecutionConfig(**GRAPHS), train=TrainConfig(bf16=True)).execution.cuda_graphs


def test_a_misspelt_auto_is_told_of_auto_where_there_is_one():
    with pytest.raises(ValueError, match=r"'atuo', expected int or 'auto'; eval_per_epoch is 'auto', expected int$"):
        TrainConfig(epochs="atuo", eval_per_epoch="auto")
    with pytest.raises(ValueError, match="sparse peak_lr 'auto': the rate of the tables is not chosen from the data"):
        make_run(sparse=OptimizerConfig("rowwise_adagrad", "auto"))
