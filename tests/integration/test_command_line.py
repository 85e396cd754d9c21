"""The real commands: `python -m gpsd_dist.train`, the same under torchrun, and `python -m gpsd_dist.evaluate`.

One training, one evaluation, one mistake and, under torchrun, one signal start Python. All others are the same commands
in processes that have done the imports (`helpers/forked.py`).
"""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from gpsd_dist.config import STRATEGIES, run_config_from_dict
from gpsd_dist.distributed import exit_codes
from gpsd_dist.schema import read_manifest
from tests.helpers import forked
from tests.helpers.commands import TINY_GIN, environment
from tests.integration.tiny_data import differing, read_checkpoint, step_folder, train_losses

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT_S = 150
STEPS = 7
TINY = TINY_GIN + "EPOCHS = 2\n"
ON_TWO_RANKS = ("pretrain", "ST_SF")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
            "--rdzv_endpoint", "localhost:0", "-m")  # fmt: skip


def _run(*command) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)


def _options(folder, data_dir, name: str, *overrides) -> list:
    """Arguments of gpsd_dist.train for a tiny run; a strategy starts from `<folder>/pretrain`."""
    stage = "pretrain" if name.startswith("pretrain") else "finetune"
    options = ["--gin_file", f"configs/stage/{stage}.gin", "--gin_file", folder / "tiny.gin"]
    options += [f"--gin.DATA_DIR={data_dir}", f"--gin.OUTPUT_DIR={folder / name}"]
    options += [f"--gin.TrainConfig.max_steps={STEPS}"]
    if stage == "finetune":
        options.append(f"--gin.STRATEGY={name}")
        options += [] if name == "NT" else [f"--gin.INIT_CHECKPOINT={folder / 'pretrain'}"]
    return [*options, *overrides]


def _train(folder, data_dir, name: str, *overrides) -> subprocess.CompletedProcess:
    return _run("gpsd_dist.train", *_options(folder, data_dir, name, *overrides))


def _train_forked(folder, data_dir, name: str, *overrides, ranks: int = 1) -> subprocess.CompletedProcess:
    return forked.run("gpsd_dist.train", *_options(folder, data_dir, name, *overrides), ranks=ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_dir):
    """Runs `pretrain` and one per strategy: NT as a user starts it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "tiny.gin").write_text(TINY)
    for name in ("pretrain", *STRATEGIES):
        if name == "NT":
            result = _train(root, data_dir, name)
        else:
            result = _train_forked(root, data_dir, name, ranks=2 if name in ON_TWO_RANKS else 1)
        assert result.returncode == 0, result.stderr
        (root / f"{name}.stderr").write_text(result.stderr)
    return root


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["pretrain", *STRATEGIES])
def test_run_folder_is_complete(folder, data_dir, name):
    run = folder / name
    config = json.loads((run / "run_config.json").read_text())
    assert config["strategy"] == ("NT" if name == "pretrain" else name) and config["data_dir"] == str(data_dir)
    assert run_config_from_dict(config).model.width == 16
    assert "TrainConfig.max_steps = 7" in (run / "config.gin").read_text()
    plan = (run / "plan.txt").read_text()
    assert ("table item: frozen" if name.endswith("SF") else "table item: trainable") in plan
    described = json.loads((run / "environment.json").read_text())
    assert described["world_size"] == (2 if name in ON_TWO_RANKS else 1) and described["versions"]["torch"]
    assert list(train_losses(run)) == list(range(1, STEPS + 1))
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(("valid/next_item/mrr" if name == "pretrain" else "valid/buy/gauc") in entry for entry in entries)
    assert list(run.glob("events.out.tfevents.*"))
    assert step_folder(run, STEPS).is_dir() and (run / "checkpoints/best.json").is_file()
    assert not list((run / "checkpoints").glob(".*partial"))


@pytest.mark.timeout(600)
def test_log_says_where_weights_come_from(folder):
    assert "weights: random, seed 0" in (folder / "pretrain.stderr").read_text()
    log = (folder / "FT_SF.stderr").read_text()
    assert f"weights: FT_SF from {folder / 'pretrain'}" in log and "loaded table.item (61, 16), frozen" in log


@pytest.mark.timeout(600)
def test_log_says_what_freezing_saves(folder):
    """Gradients that do not travel: only the run of two ranks would have sent any."""
    unsent = {}
    for name in ("ST_SF", "FT_SF", "ST"):
        lines = [line for line in (folder / name / "plan.txt").read_text().splitlines() if line.startswith("frozen: ")]
        assert all(line in (folder / f"{name}.stderr").read_text() for line in lines)
        unsent[name] = [float(re.search(r"and (\S+) MiB of them \(fp32\) not sent", line)[1]) for line in lines]
    assert unsent["ST"] == [] and unsent["FT_SF"] == [0.0]
    assert 0 < unsent["ST_SF"][0] < 61 * 16 * 4 / 2 / 2**20  # less than half of the table


@pytest.mark.timeout(600)
def test_config_gin_reproduces_the_run(folder):
    again = folder / "NT_again"
    result = forked.run("gpsd_dist.train", "--gin_file", folder / "NT/config.gin", f"--gin.OUTPUT_DIR={again}")
    assert result.returncode == 0, result.stderr
    assert train_losses(again) == train_losses(folder / "NT")
    assert not differing(read_checkpoint(step_folder(again, STEPS)), read_checkpoint(step_folder(folder / "NT", STEPS)))


def _evaluate(folder, data_dir, name: str, run=forked.run, **how) -> dict:
    out = folder / f"{name}.json"
    command = ("gpsd_dist.evaluate", "--checkpoint", folder / name, "--data", data_dir, "--metrics_out", out)
    result = run(*command, "--split", "test", **how)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())


def _test_clicks(data_dir) -> list[float | None]:
    table = pq.read_table(data_dir / read_manifest(data_dir).split("test").files[0])
    return [label for row in table["label.click"].to_pylist() for label in row]


@pytest.mark.timeout(600)
def test_evaluate_gives_the_same_result_on_one_and_two_ranks(folder, data_dir):
    one, two = _evaluate(folder, data_dir, "ST_SF", _run), _evaluate(folder, data_dir, "ST_SF", ranks=2)
    assert list(one) == list(two) == ["click", "buy"]
    for task, values in one.items():
        # A breakdown holds lists of groups, which `approx` does not enter.
        assert _numbers(two[task]) == pytest.approx(_numbers(values), abs=1e-6, nan_ok=True)
    assert one["click"]["breakdown"]["groups"].keys() == {"history", "item", "day"}
    assert one["click"]["rows"] == sum(label is not None for label in _test_clicks(data_dir))


def _numbers(values, path=""):
    """Flattens nested metrics: path -> number or name."""
    if not isinstance(values, dict | list):
        return {path: values}
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    return {name: value for key, part in inner for name, value in _numbers(part, f"{path}/{key}").items()}


@pytest.mark.timeout(600)
def test_evaluate_ranks_items_with_a_pretrained_run(folder, data_dir):
    metrics = _evaluate(folder, data_dir, "pretrain")
    assert list(metrics) == ["next_item"]
    assert metrics["next_item"]["rows"] == _test_clicks(data_dir).count(1.0)


@pytest.mark.timeout(600)
def test_report_finds_everything_that_the_commands_write(folder, data_dir):
    scores = folder / "ST_SF/test.json"
    result = forked.run("gpsd_dist.evaluate", "--checkpoint", folder / "ST_SF", "--metrics_out", scores)
    assert result.returncode == 0, result.stderr
    out = folder / "report.html"
    result = forked.run("gpsd_dist.report", *(folder / name for name in ("pretrain", *STRATEGIES)), "--out", out)
    assert result.returncode == 0 and f"{out}: {1 + len(STRATEGIES)} runs" in result.stdout, result.stderr
    page = out.read_text()
    problems = re.findall(r"<li>([^<]*/[^<]*)</li>", page)
    assert [problem for problem in problems if "not finite" not in problem] == []  # a tiny split may have no AUC
    clicks = json.loads(scores.read_text())["click"]
    assert f"{clicks['auc']:.4f}" in page and f"{clicks['log_loss']:.4f}" in page and "(best step)" in page
    for words in ("generalization gap, click", "valid MRR, next_item", "buy (given click)", "table item: frozen"):
        assert words in page, words
    assert page.count("<pre>torchrun --nproc_per_node 2 -m gpsd_dist.train --gin_file") == len(ON_TWO_RANKS)
    assert page.count("<pre>python -m gpsd_dist.train --gin_file") == 1 + len(STRATEGIES) - len(ON_TWO_RANKS)


MISTAKES = {
    "unknown file": (["--gin_file", "configs/stage/nothing.gin"], "configs/stage/pretrain.gin"),
    "unknown option": (["--gin.TrainConfig.max_stepz=3"], "did you mean 'max_steps'?"),
    "unused macro": (["--gin.WIDHT=3"], "did you mean 'WIDTH'?"),
    "wrong type": (["--gin.LAYERS=1.5"], "layers is 1.5"),
    "wrong value": (["--gin.STRATEGY=SF"], "strategy 'SF' is not one of"),
    "no checkpoint": (["--gin.STRATEGY=ST", "--gin.INIT_CHECKPOINT=/nowhere"], "/nowhere"),
    "no data": (["--gin.DATA_DIR=/nowhere"], "data_pipeline.build"),
    "unknown table": (["--gin.TRANSFER_TABLES=('itme',)"], "itme"),
    "sparse adam": (["--gin.sparse/OptimizerConfig.name=adam"], "no CPU kernel"),
    "unknown metric": (["--gin.TrainConfig.best_metric=auc", "--gin.TrainConfig.max_steps=1"], "click/auc"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_message_and_status_2(tmp_path, data_dir, mistake):
    (tmp_path / "tiny.gin").write_text(TINY)
    extra, expected = MISTAKES[mistake]
    result = _train_forked(tmp_path, data_dir, "NT", *extra)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert "Traceback" not in result.stderr
    assert expected in result.stderr and result.stderr.count("error: ") == 1, result.stderr


@pytest.mark.timeout(600)
def test_mistake_ends_the_command_with_status_2(tmp_path, data_dir):
    (tmp_path / "tiny.gin").write_text(TINY)
    result = _train(tmp_path, data_dir, "NT", "--gin.LAYERS=0")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "layers 0 must be >= 1" in lines[0]


@pytest.mark.timeout(600)
def test_refused_resume_leaves_the_run_folder_alone(folder, data_dir):
    run = folder / "ST"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = _train_forked(folder, data_dir, "ST", "--gin.SEED=9")
    assert result.returncode == 2 and "seed: 0 there, 9 now" in result.stderr
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.timeout(600)
def test_nan_loss_stops_all_ranks_with_rank_step_and_last_checkpoint(tmp_path, data_dir):
    (tmp_path / "tiny.gin").write_text(TINY)
    overrides = ["--gin.DENSE_LR=1e38", "--gin.TrainConfig.clip_norm=0.0", "--gin.TrainConfig.save_interval_steps=1"]
    overrides += ["--gin.TrainConfig.warmup_fraction=0.0"]
    result = _train_forked(tmp_path, data_dir, "pretrain_diverging", *overrides, ranks=2)
    assert result.returncode == exit_codes.FAILED
    message = next(line for line in result.stderr.splitlines() if "the loss is not finite" in line)
    assert "error: rank " in message and "step 1:" in message
    assert f"last good checkpoint: {step_folder(tmp_path / 'pretrain_diverging', 1)}" in message
    assert not step_folder(tmp_path / "pretrain_diverging", 2).exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2], ids=["plain", "torchrun"])
def test_sigterm_saves_and_the_same_command_goes_on(data_dir, tmp_path, ranks):
    """The signal reaches ranks at different moments; no step is lost or done twice."""
    (tmp_path / "tiny.gin").write_text(TINY)
    overrides = ("--gin.EPOCHS=400", "--gin.ModelConfig.dropout=0.1", "--gin.TrainConfig.eval_per_epoch=1")
    name = "pretrain_stopped"
    command = ["gpsd_dist.train", *map(str, _options(tmp_path, data_dir, name, *overrides))]
    endless = [part.replace("max_steps=7", "max_steps=100000") for part in command]
    metrics = tmp_path / name / "metrics.jsonl"
    if ranks == 1:
        process = forked.Forked(endless, environment(), tmp_path)
    else:
        process = subprocess.Popen(
            [*TORCHRUN, *endless], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
        )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (metrics.is_file() and metrics.read_text().count("\n") > 20):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "asked to stop: saved step" in stderr, stderr
    if ranks == 1:  # torchrun has a status of its own
        assert process.returncode == exit_codes.STOPPED
    stopped = max(train_losses(tmp_path / name))
    assert step_folder(tmp_path / name, stopped).is_dir()
    again = [part.replace("max_steps=7", f"max_steps={stopped + 3}") for part in command]
    result = forked.run(*again, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert f"resumed from {step_folder(tmp_path / name, stopped)}" in result.stderr
    assert list(train_losses(tmp_path / name)) == list(range(1, stopped + 4))
