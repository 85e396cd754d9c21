"""TrainConfig.profile: what is written, what it says, and that it changes no bit of the run."""

import gzip
import json
import logging
import re

import pytest

from gpsd_dist.metrics import profiling
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import differing, read_checkpoint, step_folder, tiny_run, train_runs

pytestmark = pytest.mark.timeout(300)

RANGES = (
    profiling.STEP,
    profiling.DATA_WAIT,
    profiling.LOOKUP,
    profiling.FORWARD,
    profiling.TOWER,
    profiling.BACKWARD,
    profiling.OPTIMIZER,
    profiling.COLLECTIVES,
)


def _run(stage, data_dir, output_dir, *, profile=True, **changes):
    # an epoch has 6 steps: a validation falls between two of the profiled ones
    train = {"profile": profile, "max_steps": 13, "eval_per_epoch": 6} | changes.pop("train", {})
    return tiny_run(stage, data_dir, output_dir, train=train, **changes)


def _trace_ranges(folder, rank=0) -> dict[str, list[float]]:
    """Name -> durations in ms of our ranges."""
    events = json.loads(gzip.decompress((folder / f"profile/trace_rank{rank}.json.gz").read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation"]
    return {name: [event["dur"] / 1000 for event in named if event["name"] == name] for name in RANGES}


def _parts(folder, rank=0) -> dict[str, tuple[float, float]]:
    """Part -> (ms, percent) in the summary."""
    text = (folder / f"profile/summary_rank{rank}.txt").read_text()
    lines = re.findall(r"^(\S.{26})\s+(-?[\d.]+)\s+(-?[\d.]+)%$", text, re.MULTILINE)
    return {name.strip(): (float(ms), float(percent)) for name, ms, percent in lines}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_profiling_names_every_part_and_changes_no_bit(data_dir, tmp_path, one_rank, stage):
    for name in ("on", "off"):
        run = _run(stage, data_dir, tmp_path / name, profile=name == "on", model={"dropout": 0.1})
        trainer = Trainer(run, one_rank)
        trainer.train()
        assert not {"forward", "with_history"} & set(vars(trainer.model.backbone))
    on, off = (read_checkpoint(step_folder(tmp_path / name, 13)) for name in ("on", "off"))
    assert len(on) > 20 and not differing(on, off)
    assert not (tmp_path / "off" / "profile").exists()
    ranges = _trace_ranges(tmp_path / "on")
    steps = 3
    assert {name: len(found) for name, found in ranges.items() if name != profiling.TOWER} == {
        name: steps for name in RANGES if name != profiling.TOWER
    }
    assert len(ranges[profiling.TOWER]) >= steps  # validations in between score with it too


def test_summary_adds_up(data_dir, tmp_path, one_rank):
    Trainer(_run("finetune", data_dir, tmp_path, train={"eval_per_epoch": 1}), one_rank).train()
    parts, ranges = _parts(tmp_path), _trace_ranges(tmp_path)
    all_ms, percent = parts.pop("all")
    assert percent == 100 and parts.pop("collectives, all together")[1] < 5  # one rank: only calls
    assert set(parts) == {
        *("data wait", "table lookup", "tower", "head + loss", "backward + table update"),
        *("optimizer", "small collectives", "rest"),
    }
    assert sum(ms for ms, _ in parts.values()) == pytest.approx(all_ms, abs=0.1)
    assert sum(share for _, share in parts.values()) == pytest.approx(100, abs=0.5)
    for name in ("data wait", "table lookup", "tower", "backward + table update", "optimizer"):
        assert parts[name][0] == pytest.approx(sum(ranges[name]) / 3, abs=0.02)
    forward = sum(ranges[profiling.FORWARD]) / 3
    assert parts["head + loss"][0] == pytest.approx(forward - parts["tower"][0], abs=0.02)
    text = (tmp_path / "profile/summary_rank0.txt").read_text()
    assert "steps (10 to 12 of this process)" in text and "aten::" in text
    assert re.search(r"peak_rss_gib: \d\.\d{3}", text) and "self CUDA" not in text
    assert len(text.splitlines()) < 60
    operations = text[text.index("operation ") :]
    assert not [name for name in RANGES if f"\n{name} " in operations] and "ProfilerStep" not in operations


def test_summary_of_the_prefetching_pipeline_has_its_parts(data_dir, tmp_path, one_rank):
    options = {"train": {"eval_per_epoch": 1, "micro_batches": 2}, "execution": {"pipeline": "sparse_dist"}}
    Trainer(_run("finetune", data_dir, tmp_path, **options), one_rank).train()
    parts = _parts(tmp_path)
    assert all(parts[name][0] > 0 for name in ("table lookup", "tower", "backward + table update", "optimizer"))
    assert len(_trace_ranges(tmp_path)[profiling.LOOKUP]) == len(_trace_ranges(tmp_path)[profiling.BACKWARD]) == 3


def test_short_run_warns_and_writes_nothing(data_dir, tmp_path, one_rank, caplog):
    logger = logging.getLogger("gpsd_dist.metrics.profiling")
    logger.addHandler(caplog.handler)
    Trainer(_run("finetune", data_dir, tmp_path, train={"max_steps": 11}), one_rank).train()
    logger.removeHandler(caplog.handler)
    assert "the run ended after 11 steps, before step 12" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_may_be_switched_on_when_resuming(data_dir, tmp_path, one_rank):
    """Steps count from the resumed one."""
    Trainer(_run("finetune", data_dir, tmp_path, profile=False, train={"max_steps": 4}), one_rank).train()
    trainer = Trainer(_run("finetune", data_dir, tmp_path, train={"max_steps": 16}), one_rank)
    trainer.train()
    assert trainer.step == 16 and len(_trace_ranges(tmp_path)[profiling.STEP]) == 3


def test_every_rank_writes_its_own_with_collectives(data_dir, tmp_path):
    run = _run("finetune", data_dir, tmp_path / "run", train={"eval_per_epoch": 1})
    run_distributed(train_runs, 2, tmp_path, [run], timeout_s=240)
    for rank in range(2):
        parts = _parts(tmp_path / "run", rank)
        assert parts["collectives, all together"][0] > 0 and parts["tower"][0] > 0
        assert len(_trace_ranges(tmp_path / "run", rank)[profiling.LOOKUP]) == 3
