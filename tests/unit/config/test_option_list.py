"""`train --help` lists every option, with its defaults in both stages and its documentation."""

import dataclasses

import pytest

from gpsd_dist.config import GIN_CLASSES, RunConfig, gin_cli, option_list

REQUIRED = ["--gin.DATA_DIR=d", "--gin.OUTPUT_DIR=o"]


@pytest.fixture(scope="module")
def page() -> str:
    return option_list.text(gin_cli.all_options())


def test_every_option_has_a_line(page):
    lines = {line.strip() for line in page.splitlines()}
    parts = {field.name for field in dataclasses.fields(RunConfig)} & {
        *("data", "tables", "ids", "model", "pretrain", "finetune", "dense", "sparse", "train", "execution")
    }
    for cls in GIN_CLASSES:
        for field in dataclasses.fields(cls):
            if cls is RunConfig and field.name in parts:
                continue
            scopes = ("dense/", "sparse/") if cls.__name__ == "OptimizerConfig" else ("",)
            for scope in scopes:
                name = f"{scope}{cls.__name__}.{field.name}"
                assert [x for x in lines if x.startswith(f"--gin.{name}=") or x.endswith(f"[{name}]")], name


def test_help_with_files_has_the_options_of_their_stage_alone(capsys):
    with pytest.raises(SystemExit):
        gin_cli.load_run_config(["--gin_file", "stage/finetune.gin", "--gin_file=model/l1h32a4.gin", "--help"])
    said = capsys.readouterr().out
    assert "--gin.STAGE=finetune " in said and "--gin.WIDTH=32 " in said and "FinetuneConfig: " in said
    assert "PretrainConfig: " not in said and "pretrain: " not in said


@pytest.mark.parametrize("cls", GIN_CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_is_documented(cls):
    parts = [field.name for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.default_factory)]
    if cls is RunConfig:
        parts = [name for name in parts if "Config" not in str(RunConfig.__annotations__[name])]
    docs = option_list.field_docs(cls)
    assert [name for name in parts if len(docs.get(name, "")) < 10] == []


def test_defaults_are_those_of_the_stage_files(page):
    assert "--gin.SPARSE_LR=pretrain: 0.1, finetune: 0.001   [sparse/OptimizerConfig.peak_lr]" in page
    assert "--gin.WIDTH=64   [ModelConfig.width]" in page
    assert "--gin.ExecutionConfig.pipeline=plain\n        plain | sparse_dist: while a step computes" in page


def test_help_shows_the_page(capsys, page):
    with pytest.raises(SystemExit) as end:
        gin_cli.load_run_config(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and page in said and "--nproc N" in said
