"""Sends the metrics of a run to an MLflow tracking server, from a thread of rank 0.

The thread follows `metrics.jsonl`, which is the queue, too: training never waits for the server, and what could not be
sent is sent later. MLflow itself is the extra `mlflow`; it is imported by the thread alone.
"""

import importlib.util
import json
import logging
import math
import os
import pathlib
import threading
import time
import typing

from gpsd_dist.disk.writing import write_json

STATE_NAME = ".mlflow"
"""File in OUTPUT_DIR: tracking server, id of the run there, and the last step that was sent."""
EXPERIMENT = "gpsd_dist"  # unless MLFLOW_EXPERIMENT_NAME says otherwise
RETRY_S = 30.0  # after a failure
CLOSE_S = 30.0  # that the end of a training waits for the server
STOP_S = 5.0  # that a training waits which was told to stop: whoever told it ends it soon, and its status would be lost
_HTTP = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Unless the user sets them: MLflow's own defaults repeat a request for minutes, and we try again anyway."""
_MOST_METRICS, _MOST_PARAMS, _LONGEST = 1000, 100, 500  # of one request; letters of a parameter
log = logging.getLogger(__name__)


def is_installed() -> bool:
    """Whether MLflow can be imported; imports nothing."""
    return importlib.util.find_spec("mlflow") is not None


class MlflowWriter:
    """Copies entries of `metrics.jsonl` to one MLflow run, which a resumed training goes on with."""

    def __init__(
        self,
        uri: str,
        metrics_path: pathlib.Path,
        options: dict[str, typing.Any],
        *,
        is_resumed: bool,
        retry_s: float = RETRY_S,
    ):
        """Starts the thread. `metrics_path` holds no entries but those of this run; `options`: dotted name -> value."""
        self._uri, self._path, self._options, self._retry_s = uri, metrics_path, options, retry_s
        self._state_path = metrics_path.with_name(STATE_NAME)
        self._state = self._read_state() if is_resumed else {}
        self._offset = 0  # in metrics.jsonl, of what was sent
        self._client: typing.Any = None
        self._final: tuple[str, dict[str, float], int] | None = None
        self._has_failed = self._is_done = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tells the thread that there is a new entry."""
        self._wake.set()

    def close(self, status: str, best: dict[str, float], step: int) -> None:
        """Sends what is left and ends the MLflow run; waits CLOSE_S or STOP_S at most, and says what was not sent.

        `status`: FINISHED, or KILLED for a training that goes on later. `best`: the best validation, at `step`.
        """
        self._final = status, best, step
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_S if status == "FINISHED" else STOP_S)
        if not self._is_done:
            log.warning("%s was not sent to MLflow at %s: its last part is in the file alone", self._path, self._uri)

    def _follow(self) -> None:
        while not self._is_done:
            self._wake.wait()
            self._wake.clear()
            is_last = self._closing.is_set()
            try:
                self._connect()
                self._send_entries()
                if is_last:
                    self._send_end()
                    self._is_done = True
            # Whatever the client raises: a tracking server is no reason to end a training.
            except Exception as error:
                if not self._has_failed:
                    log.warning(
                        "MLflow at %s: %s; training goes on, and this is tried again", self._uri, _first_line(error)
                    )
                self._has_failed = True
                if is_last:
                    return
                self._closing.wait(self._retry_s)
                self._wake.set()

    def _connect(self) -> None:
        """Finds or makes the MLflow run, once."""
        if self._client is not None:
            return
        for name, value in _HTTP.items():
            os.environ.setdefault(name, value)
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=self._uri)
        run_id = self._state.get("run_id") if self._state.get("uri") == self._uri else None
        if run_id is not None:
            try:
                client.update_run(run_id, status="RUNNING")
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run_id = None
        if run_id is None:
            run_id = self._new_run(client)
            self._state = {"uri": self._uri, "run_id": run_id, "step": -1}
            write_json(self._state_path, self._state)
        self._client = client

    def _new_run(self, client: typing.Any) -> str:
        from mlflow.entities import Param

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found is not None else client.create_experiment(experiment)
        folder = self._path.parent.absolute()
        name = "/".join(folder.parts[-2:])
        run_id = client.create_run(experiment_id, run_name=name, tags={"output_dir": str(folder)}).info.run_id
        params = [Param(key, f"{value}"[:_LONGEST]) for key, value in self._options.items()]
        for start in range(0, len(params), _MOST_PARAMS):
            client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
        return run_id

    def _send_entries(self) -> None:
        """Sends all complete lines behind `_offset`; those of a resumed run that were sent before are skipped."""
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            lines = [line for line in file if line.endswith(b"\n")]
        for line in lines:
            entry = json.loads(line)
            # A step has several entries (training, validation): the last one that was sent may lack the second.
            if entry["step"] >= self._state["step"]:
                self._send(entry)
                self._state["step"] = entry["step"]
            self._offset += len(line)
        if lines:
            write_json(self._state_path, self._state)

    def _send(self, entry: dict[str, typing.Any]) -> None:
        from mlflow.entities import Metric

        time_ms, step = int(entry.get("wall_time_s", time.time()) * 1000), entry["step"]
        named = {name: value for name, value in entry.items() if "/" in name or name == "epoch"}
        metrics = [Metric(_mlflow_name(n), v, time_ms, step) for n, v in named.items() if _is_finite(v)]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._state["run_id"], metrics=metrics[start : start + _MOST_METRICS])

    def _send_end(self) -> None:
        status, best, step = self._final or ("KILLED", {}, 0)
        if best:
            self._send({"step": step} | {f"best/{name}": value for name, value in best.items()} | {"best/step": step})
        self._client.set_terminated(self._state["run_id"], status)

    def _read_state(self) -> dict[str, typing.Any]:
        try:
            state = json.loads(self._state_path.read_text())
            return {"uri": str(state["uri"]), "run_id": str(state["run_id"]), "step": int(state["step"])}
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or broken: then it is another MLflow run
            return {}


def _mlflow_name(name: str) -> str:
    """Writes hr_at_10 for hr@10, which MLflow does not take."""
    return name.replace("@", "_at_")


def _is_finite(value: typing.Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
