import dataclasses
import itertools
import json
import os
import pathlib
import re

import pytest
import torch

from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.tables.collections import lookup_tables
from tests.helpers.synthetic import make_manifest

ROOT = pathlib.Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
FILES = {
    axis: sorted(path.name for path in (CONFIGS / axis).glob("*.gin")) for axis in ("stage", "data", "model", "scale")
}
PRETRAIN = ("configs/stage/pretrain.gin", "configs/data/grocery.gin")
FINETUNE = ("configs/stage/finetune.gin", "configs/data/grocery.gin")
OUT = "--gin.OUTPUT_DIR=runs/a"


def load(files, *rest):
    return load_run_config([argument for file in files for argument in ("--gin_file", str(file))] + list(rest))


def write(folder, text, name="x.gin"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("stage", "data", "model"), itertools.product(FILES["stage"], FILES["data"], FILES["model"]), ids=str
)
def test_every_combination_builds_a_run(stage, data, model):
    parsed = load([f"configs/stage/{stage}", f"configs/data/{data}", f"configs/model/{model}"], OUT)
    run = parsed.run
    assert run.stage == stage.removesuffix(".gin") and run.output_dir == "runs/a" and run.data_dir.startswith("data/")
    size = f"l{run.model.layers}h{run.model.width}a{run.model.heads}"
    assert model.startswith(size if run.model.name == "transformer" else run.model.name)


@pytest.mark.parametrize("leaf", [leaf for leaf in FILES["model"] if not re.fullmatch(r"l\d+h\d+a\d+\.gin", leaf)])
@pytest.mark.parametrize("data", FILES["data"])
@pytest.mark.parametrize("strategy", ["NT", "ST", "ST_SF"])
def test_every_other_model_builds_on_every_data_set(leaf, data, strategy):
    init = [] if strategy == "NT" else ["--gin.INIT_CHECKPOINT=runs/p"]
    files = ("configs/stage/finetune.gin", f"configs/data/{data}", f"configs/model/{leaf}")
    run = load(files, OUT, f"--gin.STRATEGY={strategy}", "--gin.DROPOUT=0.1", *init).run
    assert run.strategy == strategy and leaf.startswith(run.model.name)
    manifest, tables = make_manifest(), dataclasses.replace(run.tables, transfer=("item",))
    with torch.device("meta"):
        model = RankingModel(manifest, tables, run.model, lookup_tables(manifest, tables, True), ("click",))
    assert sum(parameter.numel() for parameter in model.backbone.tower.parameters()) > 0 or run.model.name == "deepfm"


def test_wukong_has_as_many_slots_as_events():
    files = (*FINETUNE, "configs/model/wukong.gin")
    assert load(files, OUT).run.model.max_positions == 50
    assert load(files, OUT, "--gin.MAX_HISTORY_LENGTH=7").run.model.max_positions == 7
    with pytest.raises(ValueError, match=r"max_history_length 50 with max_positions 49.*--gin.ModelConfig.max_pos"):
        load(files, OUT, "--gin.ModelConfig.max_positions=49")


@pytest.mark.parametrize("scale", FILES["scale"])
def test_every_scale_builds_with_both_stages(scale):
    stages = [load([*files, f"configs/scale/{scale}"], OUT).run.stage for files in (PRETRAIN, FINETUNE)]
    assert stages == ["pretrain", "finetune"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.gin")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_files_set_no_key_twice_and_only_stages_and_experiments_include(path):
    lines = path.read_text().splitlines()
    keys = [line.split("=")[0].strip() for line in lines if re.match(r"^[\w/.]+\s*=", line)]
    assert len(keys) == len(set(keys))
    assert path.parent.name in ("stage", "experiments") or not [line for line in lines if line.startswith("include")]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/a", "runs/a"),
        ("/tmp/a b/it's", "/tmp/a b/it's"),
        ("'runs/a'", "runs/a"),
        ('"runs/a"', "runs/a"),
        ("runs/a=b", "runs/a=b"),
        ("2024-01-01", "2024-01-01"),
        ("a#b", "a#b"),
        ("host:/export/x", "host:/export/x"),
        ("back\\slash", "back\\slash"),
        ("~/runs", "~/runs"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_strings_need_no_quotes(typed, meant, joined):
    override = [f"--gin.OUTPUT_DIR={typed}"] if joined else ["--gin.OUTPUT_DIR", typed]
    assert load(PRETRAIN, *override).run.output_dir == meant


def test_values_are_literals_where_they_look_like_it():
    run = load(
        FINETUNE,
        OUT,
        "--gin.SEED=3",
        "--gin.DENSE_LR",
        "2e-3",
        "--gin.TrainConfig.bf16=True",
        "--gin.TablesConfig.sharding={'item': 'table_wise'}",
        "--gin.TRANSFER_TABLES=('item', 'category')",
        "--gin.FinetuneConfig.task_weights={'click': 0.5}",
        "--gin.dense/OptimizerConfig.beta2=0.95",
        "--gin.INIT_CHECKPOINT=",
        "--gin.EPOCHS=%SEED",
    ).run
    assert (run.seed, run.dense.peak_lr, run.train.bf16, run.train.epochs) == (3, 2e-3, True, 3)
    assert run.tables.sharding == {"item": "table_wise"} and run.tables.transfer == ("item", "category")
    assert run.finetune.task_weights == {"click": 0.5} and run.init_checkpoint == ""
    assert (run.dense.beta2, run.sparse.beta2) == (0.95, 0.98)


def test_a_negative_number_after_a_space():
    with pytest.raises(ValueError, match="patience -1 must be >= 0"):
        load(PRETRAIN, OUT, "--gin.TrainConfig.patience", "-1")


def test_an_unscoped_override_reaches_both_optimizers():
    run = load(PRETRAIN, OUT, "--gin.OptimizerConfig.eps=1e-3").run
    assert run.dense.eps == run.sparse.eps == 1e-3


def test_later_files_and_overrides_win(tmp_path):
    leaf = write(tmp_path, "WIDTH = 96\nHEADS = 2\n")
    run = load([*PRETRAIN, "configs/model/l4h256a4.gin", leaf], OUT, "--gin.HEADS=3").run
    assert (run.model.layers, run.model.width, run.model.heads) == (4, 96, 3)


NO_EFFECT = {
    "misspelt macro": "--gin.BATCHSIZE=7",
    "misspelt scope": "--gin.dence/OptimizerConfig.peak_lr=1.0",
    "scope where there is none": "--gin.dense/TrainConfig.epochs=3",
    "scope of a scope": "--gin.dense/sparse/OptimizerConfig.eps=1e-3",
    "scoped macro": "--gin.dense/DENSE_LR=1e-3",
    "lower case": "--gin.seed=1",
    "field that both scopes set": "--gin.OptimizerConfig.peak_lr=0.123",
}
NEAR = {
    "misspelt scope": "did you mean 'dense/OptimizerConfig.peak_lr'? (or sparse/OptimizerConfig.peak_lr, ",
    "scope where there is none": "did you mean 'TrainConfig.epochs'?",
    "scope of a scope": "did you mean 'sparse/OptimizerConfig.eps'?",
    "scoped macro": "did you mean 'DENSE_LR'?",
    "lower case": "did you mean 'SEED'?",
    "field that both scopes set": "did you mean 'dense/OptimizerConfig.peak_lr'? (or sparse/OptimizerConfig.peak_lr, ",
}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_overrides_without_effect_are_errors(name):
    with pytest.raises(ValueError, match="changed nothing") as caught:
        load(PRETRAIN, OUT, NO_EFFECT[name])
    key = NO_EFFECT[name].removeprefix("--gin.").split("=")[0]
    text = str(caught.value)
    assert key in text and "are listed by gpsd-dist train --help" in text and len(text) < 400
    assert NEAR[name] in text if name in NEAR else "did you mean" not in text


@pytest.mark.parametrize(
    ("leaf", "override", "words"),
    [
        ("din", "LAYERS=9", "`LAYERS = 9` has no effect: model 'din' does not read it, of ModelConfig it reads ['bag_"),
        ("din", "HEADS=2", "model 'din' does not read it"),
        ("din", "ModelConfig.max_positions=99", "`ModelConfig.max_positions = 99` has no effect: model 'din'"),
        ("din", "ModelConfig.time_bias=False", "model 'din' does not read it"),
        (
            "dmin",
            "LAYERS=1",
            "reads ['bag_matches', 'compile', 'context_dim', 'dropout', 'heads', 'init_std', 'matches', ",
        ),
        ("wukong", "HEADS=2", "model 'wukong' does not read it"),
        ("l4h64a4", "ModelConfig.max_positions=99", "model 'transformer' does not read it"),
        ("sasrec_ml1m", "ModelConfig.head_width=8", "model 'sasrec' does not read it"),
        ("din", "PretrainConfig.temperature=0.1", "stage 'finetune' does not read PretrainConfig"),
    ],
)
def test_overrides_that_model_or_stage_do_not_read_are_errors(leaf, override, words):
    """Before: a ladder of layers over DIN trained one model many times."""
    with pytest.raises(ValueError, match=re.escape(words)):
        load(["configs/stage/finetune.gin", "configs/data/kuairand.gin", f"configs/model/{leaf}.gin"], OUT,
             f"--gin.{override}")  # fmt: skip


def test_an_override_of_finetuning_is_an_error_in_pretraining():
    with pytest.raises(ValueError, match="stage 'pretrain' does not read FinetuneConfig"):
        load(PRETRAIN, OUT, "--gin.FinetuneConfig.esmm=True")


def test_what_a_model_does_not_read_may_stand_in_a_file_or_be_the_default(tmp_path):
    files = [*FINETUNE, "configs/model/l1h32a4.gin", "configs/model/din.gin"]
    assert load(files, OUT).run.model.layers == 1
    assert load(files, OUT, "--gin.LAYERS=4", "--gin.DROPOUT=0.1", "--gin.WIDTH=32").run.model.width == 32
    leaf = write(tmp_path, "ModelConfig.max_positions = %MAX_HISTORY_LENGTH\n")
    run = load([*FINETUNE, "configs/model/din.gin", leaf], OUT, "--gin.MAX_HISTORY_LENGTH=20").run
    assert run.data.max_history_length == run.model.max_positions == 20  # the macro has another reader


def test_a_macro_that_another_override_has_replaced_is_an_error():
    with pytest.raises(ValueError, match="EPOCHS = 3` changed nothing"):
        load(PRETRAIN, OUT, "--gin.EPOCHS=3", "--gin.TrainConfig.epochs=4")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--gin.OptimiserConfig.eps=1.0", "OptimiserConfig"),
        ("--gin.OptimizerConfig.epz=1.0", "epz"),
        ("--gin.OUTPUT_DIR=%NOTHING", "NOTHING"),
        ("--gin.OUTPUT_DIR=@nothing()", "nothing"),
        ("--gin.a b=1", "is not a name"),
        ("--gin.TrainConfig.epochs.more=1", "is not a name"),
        ("--gin.TrainConfig.epochs=many", "epochs is 'many', expected int"),
        ("--gin.WIDTH=63", "multiple of 2 x heads"),
    ],
)
def test_wrong_overrides_are_named(override, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load(PRETRAIN, OUT, override)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("--gin.OptimiserConfig.eps=1.0", "OptimizerConfig"),
        ("--gin.OptimizerConfig.epz=1.0", "eps"),
        ("--gin.dense/OptimizerConfig.peaklr=1.0", "peak_lr"),
        ("--gin.WIDHT=3", "WIDTH"),
        ("--gin.dence/OptimizerConfig.peak_lr=1.0", "dense/OptimizerConfig.peak_lr"),
        ("--gin.EPOCHS=%SEAD", "SEED"),
        ("--gin.TrainConfig.epochs=@TrianConfig()", "TrainConfig"),
        ("--gin.STRATEGY=STSF", "ST_SF"),
        ("--gin.ModelConfig.name=transfomer", "transformer"),
    ],
)
def test_a_misspelt_override_is_told_what_was_meant(override, meant):
    with pytest.raises(ValueError, match=re.escape(f"; did you mean {meant!r}?")):
        load(FINETUNE, OUT, override)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("EMBEDING_DIM = 128", "EMBEDDING_DIM"),
        ("TrainConfig.epoch = 3", "epochs"),
        ("TrainCofnig.epochs = 3", "TrainConfig"),
        ("dence/OptimizerConfig.peak_lr = 1.0", "dense/OptimizerConfig.peak_lr"),
        ("TrainConfig:\n  epoch = 3", "epochs"),
    ],
)
def test_a_misspelt_line_of_a_file_is_told_what_was_meant(tmp_path, line, meant):
    with pytest.raises(ValueError, match=rf"x\.gin.*; did you mean '{meant}'\?"):
        load([*FINETUNE, write(tmp_path, line)], OUT)


@pytest.mark.parametrize("file", ["configs/model/l4h64a.gin", "configs/models/l4h64a4.gin", "l4h64a4.gin", "l4h64a4"])
def test_a_misspelt_file_is_told_what_was_meant(file):
    with pytest.raises(ValueError, match=r"does not exist; did you mean 'configs/model/l4h64a4.gin'\?; there are"):
        load([*PRETRAIN, file], OUT)


def test_what_resembles_nothing_gets_no_suggestion():
    with pytest.raises(ValueError, match="QQQ = 3` changed nothing") as caught:
        load(PRETRAIN, OUT, "--gin.QQQ=3")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("argument", ["--epochs=3", "epochs", "--gin.SEED", "--gin_fil=x"])
def test_unknown_arguments_stop_with_a_hint(argument, capsys):
    with pytest.raises(SystemExit):
        load(PRETRAIN, OUT, argument)
    assert argument in capsys.readouterr().err


def test_without_a_file_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit):
        load_run_config([])
    assert "configs/stage/pretrain.gin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "rest", "name"),
    [
        (PRETRAIN, [], "OUTPUT_DIR"),
        (PRETRAIN[:1], [OUT], "DATA_DIR"),
        (FINETUNE[:1], ["--gin.DATA_DIR=d"], "OUTPUT_DIR"),
    ],
)
def test_missing_required_options_say_how_to_set_them(files, rest, name):
    with pytest.raises(ValueError, match=rf"required option is missing \({name}\): set it with --gin.{name}=VALUE"):
        load(files, *rest)


def test_a_misspelt_option_is_told_apart_from_a_missing_one():
    with pytest.raises(ValueError, match=r"missing \(DATA_DIR\).*nothing reads DATA_DRI; did you mean 'DATA_DIR'"):
        load(PRETRAIN[:1], OUT, "--gin.DATA_DRI=d")


def test_a_problem_that_quotes_the_word_required_is_not_taken_for_a_missing_option():
    with pytest.raises(ValueError) as caught:
        load(FINETUNE, OUT, "--gin.INIT_CHECKPOINT=runs/required")
    assert str(caught.value).startswith("RunConfig: STRATEGY NT with INIT_CHECKPOINT")


def test_a_data_set_alone_lacks_its_stage():
    with pytest.raises(ValueError, match="required option is missing"):
        load(["configs/data/grocery.gin"], OUT)


def test_a_missing_file_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"nowhere.gin does not exist.*configs/model/l4h64a4.gin"):
        load([*PRETRAIN, "configs/model/nowhere.gin"], OUT)


@pytest.mark.parametrize("key", ["WIDTH", "TrainConfig.epochs", "dense/OptimizerConfig.eps"])
def test_a_key_twice_in_one_file_is_an_error(tmp_path, key):
    leaf = write(tmp_path, f"{key} = 1\nLAYERS = 2\n{key}=2\n")
    with pytest.raises(ValueError, match=rf"x\.gin sets \['{key}'\] twice"):
        load([*PRETRAIN, leaf], OUT)


def test_keys_that_differ_only_in_scope_are_not_twice(tmp_path):
    leaf = write(
        tmp_path, "# WIDTH = 5\nWIDTH = 32\ndense/OptimizerConfig.eps = 1e-3\nsparse/OptimizerConfig.eps = 1e-4\n"
    )
    run = load([*PRETRAIN, leaf], OUT).run
    assert (run.model.width, run.dense.eps, run.sparse.eps) == (32, 1e-3, 1e-4)


@pytest.mark.parametrize("text", ["include 'configs/base.gin'\n", "WIDTH = 32\n  include 'configs/base.gin'\n"])
def test_an_include_in_a_later_file_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match="must be the first --gin_file"):
        assert load([*PRETRAIN, write(tmp_path, text)], OUT).run.model.width == (32 if "WIDTH" in text else 64)


@pytest.mark.parametrize("text", ["# include 'configs/base.gin'\n", "  # include me\nWIDTH = 32  # include 'x'\n"])
def test_a_comment_about_includes_is_no_include(tmp_path, text):
    assert load([*PRETRAIN, write(tmp_path, text)], OUT).run.model.width == (32 if "WIDTH" in text else 64)


def test_a_first_file_that_includes_a_stage_is_an_experiment(tmp_path):
    text = "include 'configs/stage/finetune.gin'\ninclude 'configs/data/kuairand.gin'\nEPOCHS = 2\n"
    run = load([write(tmp_path, text)], OUT).run
    assert (run.stage, run.train.epochs, run.train.patience, run.data_dir) == ("finetune", 2, "auto", "data/kuairand")


@pytest.mark.parametrize("text", ["WIDTH = \n", "WIDTH 32\n", "include 'configs/nothing.gin'\n", "NoConfig.x = 1\n"])
def test_broken_files_are_value_errors(tmp_path, text):
    with pytest.raises(ValueError):
        load([write(tmp_path, text)], OUT)


def test_it_works_from_another_working_directory(tmp_path, monkeypatch):
    expected = load(PRETRAIN, OUT)
    (tmp_path / "configs").mkdir()  # must not be taken for ours
    monkeypatch.chdir(tmp_path)
    assert load(PRETRAIN, OUT) == expected
    assert load([ROOT / file for file in PRETRAIN], OUT) == expected
    write(tmp_path, "WIDTH = 32\n", "mine.gin")
    assert load([*PRETRAIN, "mine.gin"], OUT).run.model.width == 32
    assert pathlib.Path(os.getcwd()) == tmp_path


@pytest.mark.parametrize("files", [PRETRAIN, FINETUNE, (*FINETUNE, "configs/model/l24h1024a16.gin")], ids=str)
def test_the_saved_text_gives_the_same_run(tmp_path, files):
    overrides = [
        "--gin.OUTPUT_DIR=/a b/it's",
        "--gin.dense/OptimizerConfig.eps=1e-5",
        "--gin.OptimizerConfig.beta1=0.8",
        "--gin.TablesConfig.sharding={'item': 'column_wise'}",
        "--gin.TrainConfig.best_metric=" + "long/" * 30,
        "--gin.EPOCHS=%SEED",
        "--gin.SEED=4",
    ]
    parsed = load(files, *overrides)
    again = load([write(tmp_path, parsed.gin_text, "config.gin")])
    assert again == parsed and again.run.seed == 4


def test_nothing_leaks_into_the_next_parse():
    expected = load(PRETRAIN, OUT)
    load(FINETUNE, OUT, "--gin.SEED=5", "--gin.TrainConfig.bf16=True", "--gin.OptimizerConfig.eps=1e-3")
    with pytest.raises(ValueError):
        load(PRETRAIN, OUT, "--gin.WIDTH=63", "--gin.SEED=8")
    assert load(PRETRAIN, OUT) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "EMBEDING_DIM = 128",
            r"x.gin, line 2: nothing reads EMBEDING_DIM; did you mean 'EMBEDDING_DIM'\?; there are the macros \[",
        ),
        ("dence/OptimizerConfig.peak_lr = 1.0", "x.gin, line 2: nothing reads dence/OptimizerConfig.peak_lr"),
        ("TrainConfig.epochs = %EPOCH", r"nothing sets %EPOCH; did you mean 'EPOCHS'\?; set macros are \["),
        ("import os", "`import os` is refused: a configuration imports nothing"),
        ("from os import path", "is refused: a configuration imports nothing"),
        ("TrainConfig.epochs = @os.system()", "@os.system is none of"),
        ("TrainConfig.epochs = @gin.singleton()", "@gin.singleton is none of"),
        ("gin.macro.value = 3", "gin.macro is none of"),
        ("TrainConfig.epochs = [1,", "x.gin: TokenError"),
    ],
)
def test_files_with_what_nothing_reads_or_what_would_run_code_are_refused(tmp_path, line, message):
    """gin accepts a misspelt macro or scope silently, and imports what a file says."""
    with pytest.raises(ValueError, match=message):
        load([*FINETUNE, write(tmp_path, f"# a comment\n{line}\n")], OUT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("include 'configs/nowhere.gin'", "which is no .gin file"),
        ("include '/etc/passwd'", "which is no .gin file"),
        ("include 'configs/base.gin'\ninclude 'configs/stage/finetune.gin'", "which is read already"),
    ],
)
def test_includes_that_cannot_be_are_refused(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load([write(tmp_path, line)], OUT)


def test_a_file_that_includes_itself_is_refused(tmp_path):
    path = tmp_path / "x.gin"
    with pytest.raises(ValueError, match="which is read already"):
        load([write(tmp_path, f"include '{path}'")], OUT)


def test_a_file_that_is_too_large_is_refused(tmp_path):
    with pytest.raises(ValueError, match="more than 1,048,576 bytes: this is no configuration"):
        load([*FINETUNE, write(tmp_path, "# " + "x" * 2**20)], OUT)


@pytest.mark.parametrize(
    "reference", ["%SEED\nimport os", "@TrainConfig()\ninclude 'configs/base.gin'", "%SEED\nWIDTH = 7"]
)
def test_an_override_is_one_statement(reference):
    """What followed a line break was parsed as more of the configuration: an import was run."""
    with pytest.raises(ValueError, match=r"imports nothing|an override sets one value, this is 2 statements"):
        load(FINETUNE, OUT, f"--gin.SEED={reference}")


@pytest.mark.parametrize("value", ["1e999", "-1e999"])
def test_options_are_finite(value):
    with pytest.raises(ValueError, match=r"peak_lr is -?inf, expected finite numbers"):
        load(FINETUNE, OUT, f"--gin.DENSE_LR={value}")


@pytest.mark.parametrize("value", ["(" * 5000, "-" * 50_000 + "1", "{[]: 1}"])
def test_a_value_that_python_cannot_parse_is_a_text(value):
    assert load(FINETUNE, OUT, f"--gin.DATA_DIR={value}").run.data_dir == value


def test_a_misspelt_scope_is_answered_with_options_that_have_their_default():
    with pytest.raises(ValueError, match=r"did you mean 'dense/OptimizerConfig.beta1'"):
        load(PRETRAIN, OUT, "--gin.densee/OptimizerConfig.beta1=0.8")
    with pytest.raises(ValueError, match=r"did you mean 'DataConfig.num_threads'"):
        load(PRETRAIN, OUT, "--gin.dense/DataConfig.num_threads=2")


def test_a_misspelt_field_is_answered_with_those_near_or_with_all_of_its_class():
    with pytest.raises(ValueError, match=r"has no option 'keep_lats'; did you mean 'keep_last'\?") as caught:
        load(PRETRAIN, OUT, "--gin.TrainConfig.keep_lats=1")
    assert "hang_timeout_s" not in str(caught.value)
    with pytest.raises(ValueError, match=r"has no option 'xyz'; it has \['epochs', .*'hang_timeout_s'"):
        load(PRETRAIN, OUT, "--gin.TrainConfig.xyz=1")


def test_a_config_gin_of_commit_14e4532_means_the_run_that_it_meant_then():
    """It is how an old run goes on after defaults in configs/ have changed. The commit wrote both files."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "assets" / "gin_14e4532"
    saved = json.loads((folder / "run_config.json").read_text())
    run = json.loads(json.dumps(dataclasses.asdict(load([str(folder / "config.gin")]).run)))
    younger = {
        "model": {"revision", "parametrization", "matches", "bag_matches", "number_buckets"},
        "finetune": {"weighted_metrics", "offset"},
    }
    younger["finetune"].add("warm_start")
    younger |= {
        "pretrain": {"popular_share", "log_q", "item_bias", "recent_days"},
        "tables": {"new_rows", "frozen_rows"},
    }
    younger |= {"data": {"cache_dir", "cache_gib", "unknown_rate"}, "execution": {"matmul_dtype"}}
    younger |= {"train": {"average_fraction", "mlflow_uri"}}
    for part, names in younger.items():
        run[part] = {name: value for name, value in run[part].items() if name not in names}
    assert run == saved


# ---- where files are found ------------------------------------------------------------------------------------------


def test_files_are_found_in_the_package_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (OUT, "--gin.DATA_DIR=d", "--gin.EPOCHS=7")
    long, short = (load([f"{before}stage/finetune.gin"], *given) for before in ("configs/", ""))
    assert long.run == short.run and long.run.train.epochs == 7


def test_a_file_of_the_working_directory_goes_before_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/model").mkdir(parents=True)
    (tmp_path / "configs/model/l1h32a4.gin").write_text("WIDTH = 48\n")
    files = ["stage/finetune.gin", "model/l1h32a4.gin"]
    assert load(files, OUT, "--gin.DATA_DIR=d").run.model.width == 48
    (tmp_path / "model").mkdir()
    (tmp_path / "model/l1h32a4.gin").write_text("WIDTH = 56\n")
    assert load(files, OUT, "--gin.DATA_DIR=d").run.model.width == 56


def test_an_include_in_a_file_of_the_package_is_not_caught_by_a_users_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.gin").write_text("nonsense = 1\n")
    assert load(["stage/finetune.gin"], OUT, "--gin.DATA_DIR=d").run.stage == "finetune"


def test_a_users_file_includes_another_one_and_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gin").write_text("include 'stage/finetune.gin'\ninclude 'sizes.gin'\nWIDTH = 24\nHEADS = 2\n")
    (tmp_path / "sizes.gin").write_text("WIDTH = 16\nLAYERS = 3")
    model = load(["mine.gin"], OUT, "--gin.DATA_DIR=d").run.model
    assert (model.width, model.layers, model.heads) == (24, 3, 2)
