"""The quick tour of docs/serving.md, typed as it stands there, on tiny data and a free port."""

import json
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from gpsd_dist.serving import load
from tests.helpers.commands import TINY_GIN, environment
from tests.integration.test_export import data_dir

__all__ = ["data_dir"]  # a fixture: tiny data whose items have the attributes of items.parquet
REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (REPO_ROOT / "docs" / "serving.md").read_text()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def scored(data_dir, tmp_path_factory):
    """Types the commands; (artefact, request, answer of the server)."""
    folder, port = tmp_path_factory.mktemp("tour"), free_port()
    (folder / "tiny.gin").write_text(TINY_GIN + "EPOCHS = 1\n")
    places = {"data/mine": data_dir, "runs/mine": folder / "runs", "artefacts/ctr": folder / "ctr", "8080": port}
    places["request.json"] = folder / "request.json"
    train, export, verify, serve, score = _commands(places)
    for command in ([*train, "--gin_file", str(folder / "tiny.gin")], export, verify):
        done = subprocess.run(command, env=environment(), cwd=REPO_ROOT, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
    (examples,) = (folder / "ctr" / "versions").glob("*/examples.json")
    request = {"requests": json.loads(examples.read_text())["requests"][:3]}
    (folder / "request.json").write_text(json.dumps(request))
    assert serve[-1] == "&"
    server = subprocess.Popen([*serve[:-1], "--deadline_ms", "60000"], env=environment(), cwd=REPO_ROOT)
    try:
        _wait_until_ready(port, server)
        done = subprocess.run(score, capture_output=True, text=True, timeout=60)
        yield folder / "ctr", request["requests"], json.loads(done.stdout)
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0


def _commands(places: dict[str, object]) -> list[list[str]]:
    block = re.search(r"```\n(gpsd-dist train.*?)```", PAGE, re.DOTALL)[1]
    for name, place in places.items():
        assert name in block, name
        block = block.replace(name, str(place))
    commands = [shlex.split(line) for line in block.splitlines()]
    assert len(commands) == 5
    started = [sys.executable, "-m", "gpsd_dist"]  # what the command gpsd-dist does
    return [[*started, *words[1:]] if words[0] == "gpsd-dist" else words for words in commands]


def _wait_until_ready(port: int, server: subprocess.Popen) -> None:
    until_s = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert server.poll() is None and time.monotonic() < until_s
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_five_commands_lead_from_training_to_scores(scored):
    artefact, requests, answer = scored
    expected = load(artefact).score(requests)
    assert len(answer["answers"]) == len(requests)
    for found, entry in zip(answer["answers"], expected, strict=True):
        assert found["version"] == entry.version
        for task, scores in entry.tasks.items():
            assert found["tasks"][task]["logit"] == pytest.approx(scores["logit"], abs=1e-5)


def test_the_answer_on_the_page_has_the_fields_of_an_answer():
    shown = re.search(r"The answer:\n\n```\n(.*?)```", PAGE, re.DOTALL)[1]
    (answer,) = json.loads(shown)["answers"]
    assert answer.keys() == {"version", "tasks", "unknown_ids", "dropped_events"}
    assert answer["tasks"]["click"].keys() == {"logit", "probability"}


def test_options_and_metrics_on_the_page_exist():
    from gpsd_dist.serving.metrics import Metrics

    done = subprocess.run(
        [sys.executable, "-m", "gpsd_dist.serve", "--help"], capture_output=True, text=True, cwd=REPO_ROOT, timeout=60
    )
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
    serving = "".join(sections[name] for name in ("Paths", "Load", "Versions", "Metrics", "Logged requests"))
    for option in re.findall(r"`(--\w+)", serving):
        assert option in done.stdout or option == "--target", option  # docker's
    text = Metrics().text().decode()
    named = set(re.findall(r"\b(gpsd_[a-z_]+)\b", PAGE)) - {"gpsd_dist"}
    assert len(named) > 8 and [name for name in named if name.removesuffix("_total") not in text] == []
