"""Starts a real scoring server in a process of its own, and speaks HTTP with it."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import typing

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
START_S, END_S = 90, 60


class ServerProcess:
    def __init__(self, process: subprocess.Popen, port: int, log: pathlib.Path) -> None:
        self.process, self.port, self.log = process, port, log

    def ask(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"content-type": content_type} | headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def get(self, path: str) -> tuple[int, typing.Any]:
        status, _, body = self.ask("GET", path)
        return status, json.loads(body)

    def score(self, *requests: typing.Any) -> tuple[int, typing.Any]:
        status, _, body = self.ask("POST", "/v1/score", json.dumps({"requests": requests}).encode())
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        """Value of a line of /metrics; 0 if there is none yet."""
        _, _, text = self.ask("GET", "/metrics")
        found = re.search(rf"^{re.escape(name)} (\S+)$", text.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, condition: typing.Callable[[], bool]) -> None:
        until_s = time.monotonic() + START_S
        while not condition():
            assert time.monotonic() < until_s, self.log.read_text()
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=END_S)


@contextlib.contextmanager
def serving(
    artefact: pathlib.Path, *options: object, module: str = "gpsd_dist.serve", folder: pathlib.Path
) -> typing.Iterator[ServerProcess]:
    """Runs a server on a free port until the block ends; its output goes to `folder`/server.log."""
    log = folder / "server.log"
    command = [sys.executable, "-m", module, str(artefact), "--port", "0", *map(str, options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_ROOT)}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=REPO_ROOT, env=env)
    try:
        until_s = time.monotonic() + START_S
        while not (found := re.search(r"ready: .* on http://127\.0\.0\.1:(\d+)$", log.read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < until_s, log.read_text()
            time.sleep(0.05)
        yield ServerProcess(process, int(found[1]), log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
