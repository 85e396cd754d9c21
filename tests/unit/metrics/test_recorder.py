"""Recorder: reductions over steps, one history per curve, JSON without NaN, and what a person sees."""

import contextlib
import json
import logging
import math

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import api_pb2 as hparams_api
from tensorboard.plugins.hparams import metadata as hparams_metadata

from gpsd_dist import validation
from gpsd_dist.metrics import progress_bar, recorder


def _entries(folder):
    return [json.loads(line) for line in (folder / recorder.JSONL_NAME).read_text().splitlines()]


def test_reductions_over_steps(tmp_path):
    recorded = recorder.Recorder(tmp_path, 0)
    for value in (1.0, 5.0, 3.0):
        recorded.record("a/mean", value)
        recorded.record("a/sum", torch.tensor(value), reduce="sum")
        recorded.record("a/max", torch.tensor([value], dtype=torch.bfloat16), reduce="max")
        recorded.record("a/last", value, reduce="last")
        recorded.record("train/loss", torch.tensor(value, requires_grad=True))
    expected = {"a/mean": 3.0, "a/sum": 9.0, "a/max": 5.0, "a/last": 3.0, "train/loss": 3.0}
    assert recorded.log(3, 0.25) == expected
    recorded.record("a/sum", 4, reduce="sum")  # a new window
    assert recorded.log(6, 0.5) == {"a/sum": 4.0}
    recorded.close()
    first, second = _entries(tmp_path)
    assert first.pop("wall_time_s") > 1e9
    assert first == {"step": 3, "epoch": 0.25, **expected}
    assert list(second) == ["step", "epoch", "wall_time_s", "a/sum"]


def test_a_full_disk_is_named_once_and_closing_does_not_hide_it(tmp_path):
    recorded = recorder.Recorder(tmp_path, 0)
    recorded._jsonl.close()
    recorded._jsonl = open("/dev/full", "a")  # noqa: SIM115  the recorder closes it
    recorded.record("train/loss", 1.0)
    with (
        pytest.raises(OSError, match=rf"metrics of step 7 were not written, {tmp_path}: .*No space left"),
        contextlib.closing(recorded),
    ):
        recorded.log(7, 0.5)


def test_recorded_tensor_may_be_reused_by_the_caller(tmp_path):
    recorded = recorder.Recorder(tmp_path, 0)
    loss = torch.tensor(1.0, dtype=torch.float64)
    recorded.record("train/loss", loss)
    loss.fill_(9)
    assert recorded.log(1, 0)["train/loss"] == 1


def test_nan_is_null_in_json_and_nan_in_the_result(tmp_path):
    recorded = recorder.Recorder(tmp_path, 0)
    recorded.record("valid/click/auc", math.nan, reduce="last")
    recorded.record("train/loss", math.nan)
    for value in (math.nan, 1.0):
        recorded.record("train/grad_norm", value, reduce="max")
    metrics = recorded.log(1, 0)
    recorded.close()
    assert all(math.isnan(value) for value in metrics.values())
    assert _entries(tmp_path)[0]["valid/click/auc"] is None


def test_json_safe_reaches_nested_values():
    nested = {"a": [1, math.inf, {"b": math.nan}], "c": "NaN"}
    assert validation.json_safe(nested) == {"a": [1, None, {"b": None}], "c": "NaN"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "loss", "value": 1.0}, "expected a path"),
        ({"name": "a/b", "value": 1.0, "reduce": "median"}, "expected a path like train/loss and one of"),
        ({"name": "a/first", "value": 1.0, "reduce": "sum"}, "recorded with reduce='mean', now 'sum'"),
        ({"name": "a/b", "value": torch.ones(2)}, r"shape \(2,\)"),
    ],
)
def test_bad_records_raise(tmp_path, arguments, message):
    recorded = recorder.Recorder(tmp_path, 0)
    recorded.record("a/first", 1.0)
    recorded.log(1, 0)
    with pytest.raises(ValueError, match=message):
        recorded.record(**arguments)


def _run(folder, steps, resume_step=None):
    recorded = recorder.Recorder(folder, 0, resume_step=resume_step)
    for step in steps:
        recorded.record("train/loss", float(step + 100 * (resume_step or 0)))
        recorded.log(step, 0)
    recorded.close()


def test_resume_leaves_one_history(tmp_path, caplog):
    _run(tmp_path, range(6))
    with open(tmp_path / recorder.JSONL_NAME, "a") as file:
        file.write('{"step": 6, "tra')  # killed while it wrote
    _run(tmp_path, range(4, 7), resume_step=3)
    expected = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 304), (5, 305), (6, 306)]
    assert [(entry["step"], entry["train/loss"]) for entry in _entries(tmp_path)] == expected
    assert "removed 3 of 7 entries" in caplog.text
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected


def test_options_and_the_best_validation_are_for_tensorboards_hyperparameters(tmp_path):
    recorded = recorder.Recorder(tmp_path, 0)
    recorded.describe({"seed": 3, "strategy": "NT", "train.bf16": True, "tables.transfer": ["item"]})
    recorded.finish({"click/auc": 0.75}, 40)
    recorded.close(is_finished=True)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("best/click/auc")] == [(40, 0.75)]
    contents = events.PluginTagToContent(hparams_metadata.PLUGIN_NAME)
    options = hparams_metadata.parse_session_start_info_plugin_data(
        contents[hparams_metadata.SESSION_START_INFO_TAG]
    ).hparams
    assert (options["seed"].number_value, options["strategy"].string_value) == (3, "NT")
    assert options["tables.transfer"].string_value == '["item"]' and "train.bf16" in options
    end = hparams_metadata.parse_session_end_info_plugin_data(contents[hparams_metadata.SESSION_END_INFO_TAG])
    assert end.status == hparams_api.STATUS_SUCCESS


def test_new_run_in_an_old_folder_starts_clean(tmp_path):
    _run(tmp_path, range(3))
    _run(tmp_path, [0])
    assert [entry["step"] for entry in _entries(tmp_path)] == [0]


@pytest.mark.parametrize("content", [b"hello\n{}\n", b"\xff\xfe\x00h\n{}\n"])
def test_foreign_file_is_not_rewritten(tmp_path, content):
    (tmp_path / recorder.JSONL_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="line 1 is not an entry of a run"):
        recorder.Recorder(tmp_path, 0)
    assert (tmp_path / recorder.JSONL_NAME).read_bytes() == content


def test_other_ranks_write_nothing(tmp_path):
    recorded = recorder.Recorder(tmp_path, 1)
    recorded.record("train/loss", 1.0)
    recorded.log(1, 0)
    recorded.close()
    assert not list(tmp_path.iterdir())


def test_progress_without_a_terminal_is_one_line_per_log_step(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recorded = recorder.Recorder(tmp_path, 0, progress=progress_bar.ProgressBar(100, is_terminal=False))
    recorded.record("train/loss", 0.5)
    recorded.record("perf/examples_per_s", 1234.0, reduce="sum")
    recorded.log(10, 0.1)
    recorded.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("step 10/100  loss 0.5000  1,234 examples/s  ") and line.endswith(" left")


def test_progress_on_a_terminal_shows_a_bar(capsys):
    shown = progress_bar.ProgressBar(100, first_step=20, is_terminal=True)
    shown.show(60, {"train/loss": 0.25, "perf/tokens_per_s": 5000.0})
    shown.close()
    text = capsys.readouterr().err
    assert "60/100 steps" in text and "loss 0.2500" in text and "5,000 tokens/s" in text


def test_time_left_counts_from_the_resumed_step(monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now_s[0])
    shown = progress_bar.ProgressBar(100, first_step=20, is_terminal=False)
    assert math.isnan(shown.left_s())
    now_s[0] += 30
    shown.show(50, {})
    assert shown.left_s() == 50
