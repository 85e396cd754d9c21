"""A run is described in its folder when it is accepted, not before: the report takes a description for a run."""

import contextlib

from gpsd_dist import train
from gpsd_dist.distributed import runtime
from gpsd_dist.report.run_folder import CONFIG_NAME
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import tiny_run


def options(data_dir, folder, **more) -> list[str]:
    values = {
        "DATA_DIR": data_dir,
        "OUTPUT_DIR": folder / "run",
        "STRATEGY": "FT",
        "INIT_CHECKPOINT": folder / "source",
        "LAYERS": 1,
        "WIDTH": 16,
        "HEADS": 2,
        "EMBEDDING_DIM": 16,
        "MAX_HISTORY_LENGTH": 10,
        "GLOBAL_BATCH_ROWS": 8,
        "TablesConfig.small_table_max_rows": 20,
        "DataConfig.num_data_shards": 2,
        "TrainConfig.max_steps": 1,
    }
    return ["--gin_file", "configs/stage/finetune.gin", *(f"--gin.{k}={v}" for k, v in (values | more).items())]


def test_a_refused_transfer_leaves_no_run_behind(data_dir, tmp_path, one_rank, monkeypatch, capsys):
    Trainer(tiny_run("pretrain", data_dir, tmp_path / "source", train={"max_steps": 1}), one_rank).train()
    monkeypatch.setattr(runtime, "process_group", lambda timeout_s: contextlib.nullcontext(one_rank))  # there is one
    run = tmp_path / "run"
    for mistake, message in (({"LAYERS": 2}, "layers 1 there, 2 here"), ({"WIDTH": 32}, "does not fit")):
        assert train.main(options(data_dir, tmp_path, **mistake)) == 2
        assert message in capsys.readouterr().err
        assert [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")] == []
    assert train.main(options(data_dir, tmp_path)) == 0
    assert (run / CONFIG_NAME).is_file()


def test_a_misspelt_stage_is_refused_before_its_folder_is_made(data_dir, tmp_path, capsys):
    mistake = {"STAGE": "finetnue", "STRATEGY": "NT", "INIT_CHECKPOINT": "", "PretrainConfig.temperature": 0.1}
    assert train.main(options(data_dir, tmp_path, **mistake)) == 2
    assert (
        "stage 'finetnue' is not one of ('pretrain', 'finetune'); did you mean 'finetune'?" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
