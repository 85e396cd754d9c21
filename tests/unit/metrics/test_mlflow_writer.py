"""The MLflow writer: what it sends, how it goes on after a resume, a server that is down, the real client."""

import json
import logging
import sys
import threading
import time
import types

import pytest

from gpsd_dist.metrics import mlflow_writer
from gpsd_dist.metrics.mlflow_writer import MlflowWriter
from gpsd_dist.metrics.recorder import JSONL_NAME, Recorder


class Server:
    """Takes the place of the package `mlflow`; fails as often as `failures` says."""

    def __init__(self, failures: int = 0):
        self.failures, self.runs = failures, {}
        self.exceptions = types.SimpleNamespace(MlflowException=_MlflowError)

    def MlflowClient(self, tracking_uri):
        if self.failures:
            self.failures -= 1
            raise ConnectionError(f"cannot reach {tracking_uri}\nand more")
        return self

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=f"id of {name}")

    def create_run(self, experiment_id, run_name, tags):
        run_id = f"{len(self.runs)}"
        self.runs[run_id] = {"name": run_name, "params": {}, "metrics": [], "status": "RUNNING", "of": experiment_id}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        if run_id not in self.runs:
            raise _MlflowError()
        self.runs[run_id]["status"] = status

    set_terminated = update_run

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(metrics) <= 1000 and len(params) <= 100
        self.runs[run_id]["params"] |= {param[0]: param[1] for param in params}
        self.runs[run_id]["metrics"] += [(name, value, step) for name, value, _, step in metrics]


class _MlflowError(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


@pytest.fixture
def server(monkeypatch):
    made = Server()
    entities = types.ModuleType("mlflow.entities")
    entities.Param = entities.Metric = lambda *values: values
    monkeypatch.setitem(sys.modules, "mlflow", made)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for name in mlflow_writer._HTTP:
        monkeypatch.setenv(name, "1")
    return made


def _train(folder, steps, *, resume_step=None, is_finished=True, uri="http://host"):
    """What a training does: a loss at each step, a validation at each second one."""
    recorded = Recorder(folder, 0, resume_step=resume_step)
    recorded.describe(
        {"seed": 1, "train.epochs": 2, "tables.transfer": ["item"]}, uri, is_resumed=resume_step is not None
    )
    for step in steps:
        recorded.record("train/loss", 10.0 - step)
        recorded.log(step, step / 4)
        if step % 2 == 0:
            recorded.record("valid/next_item/hr@10", step / 100, reduce="last")
            recorded.record("valid/next_item/mrr", float("nan"), reduce="last")
            recorded.log(step, step / 4)
    if is_finished:
        recorded.finish({"next_item/hr@10": 0.5}, max(steps))
    recorded.close(is_finished=is_finished)
    recorded.close(is_finished=is_finished)  # the trainer closes twice


def test_options_metrics_and_the_best_validation_are_sent(server, tmp_path):
    _train(tmp_path / "runs/a", range(1, 5))
    (run,) = server.runs.values()
    assert (run["name"], run["status"], run["of"]) == ("runs/a", "FINISHED", "id of gpsd_dist")
    assert run["params"] == {"seed": "1", "train.epochs": "2", "tables.transfer": "['item']"}
    assert [(value, step) for name, value, step in run["metrics"] if name == "train/loss"] == [
        (9.0, 1), (8.0, 2), (7.0, 3), (6.0, 4)]  # fmt: skip
    assert [(value, step) for name, value, step in run["metrics"] if "hr" in name] == [(0.02, 2), (0.04, 4), (0.5, 4)]
    names = {name for name, _, _ in run["metrics"]}
    assert names == {"train/loss", "epoch", "valid/next_item/hr_at_10", "best/next_item/hr_at_10", "best/step"}


def test_a_resumed_run_goes_on_in_its_mlflow_run(server, tmp_path):
    _train(tmp_path, range(1, 5), is_finished=False)
    assert [run["status"] for run in server.runs.values()] == ["KILLED"]
    _train(tmp_path, range(3, 7), resume_step=2)
    (run,) = server.runs.values()
    losses = [step for name, _, step in run["metrics"] if name == "train/loss"]
    assert losses == [1, 2, 3, 4, 4, 5, 6] and run["status"] == "FINISHED"  # step 3 is there; 4 may lack an entry
    _train(tmp_path, range(1, 3))  # a new run in the same folder
    assert len(server.runs) == 2
    server.runs.clear()  # somebody deleted them
    _train(tmp_path, range(3, 5), resume_step=2)
    assert [step for name, _, step in server.runs["0"]["metrics"] if name == "train/loss"] == [1, 2, 3, 4]


def test_a_server_that_is_down_is_said_once_and_tried_again(server, tmp_path, caplog, monkeypatch):
    server.failures = 3
    path = tmp_path / JSONL_NAME
    path.write_text(json.dumps({"step": 1, "train/loss": 2.0}) + "\n")
    with caplog.at_level(logging.WARNING):
        writer = MlflowWriter("http://host", path, {}, is_resumed=False, retry_s=0.01)
        writer.wake()
        while server.failures:
            assert writer._thread.is_alive()
        writer.close("FINISHED", {}, 1)
    (run,) = server.runs.values()
    assert run["metrics"] == [("train/loss", 2.0, 1)] and run["status"] == "FINISHED"
    (said,) = caplog.messages
    assert said == (
        "MLflow at http://host: ConnectionError: cannot reach http://host; training goes on, and this is tried again"
    )


def test_what_never_reached_the_server_is_said_and_sent_by_a_resumed_run(server, tmp_path, caplog):
    server.failures = 10**9
    _train(tmp_path, range(1, 3), is_finished=False)
    assert server.runs == {} and "was not sent to MLflow at http://host" in caplog.messages[-1]
    server.failures = 0
    _train(tmp_path, range(3, 5), resume_step=2)
    (run,) = server.runs.values()
    assert [step for name, _, step in run["metrics"] if name == "train/loss"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("is_finished", "limit"), [(True, "CLOSE_S"), (False, "STOP_S")])
def test_a_server_that_hangs_delays_the_end_by_a_limit_only(server, tmp_path, monkeypatch, caplog, is_finished, limit):
    """A training that was stopped has less time: its launcher, or the scheduler, kills it after a while."""
    never = threading.Event()
    assert mlflow_writer.STOP_S < 10 < mlflow_writer.CLOSE_S
    monkeypatch.setattr(server, "create_run", lambda *args, **kwargs: never.wait(30))
    monkeypatch.setattr(mlflow_writer, limit, 0.05)
    started_s = time.monotonic()
    _train(tmp_path, [1], is_finished=is_finished)
    assert time.monotonic() - started_s < 4
    assert "was not sent to MLflow" in caplog.text
    never.set()
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(10)


def test_no_uri_imports_nothing(tmp_path):
    Recorder(tmp_path, 0).describe({"seed": 1})
    assert "mlflow" not in sys.modules or not hasattr(sys.modules["mlflow"], "runs")
    assert not (tmp_path / mlflow_writer.STATE_NAME).exists()


def test_the_real_client_with_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'gpsd-dist[mlflow]'")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of a test")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/server"
    for resume_step, steps in ((None, range(1, 5)), (2, range(3, 7))):
        _train(tmp_path / "run", steps, resume_step=resume_step, is_finished=resume_step is not None, uri=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("of a test").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["tables.transfer"] == "['item']"
    assert run.data.metrics["best/next_item/hr_at_10"] == 0.5
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted({point.step for point in history}) == [1, 2, 3, 4, 5, 6]


def test_the_real_client_without_a_server(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'gpsd-dist[mlflow]'")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _train(tmp_path, range(1, 3), uri="http://127.0.0.1:9")
    assert [message.startswith("MLflow at http://127.0.0.1:9: ") for message in caplog.messages] == [True, False]
    assert "was not sent to MLflow" in caplog.messages[-1]
