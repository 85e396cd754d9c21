"""What `gpsd_dist.train` writes into a run folder besides metrics and checkpoints."""

import json
import logging
import resource
import subprocess
import sys
import types

import pytest
import torch

from gpsd_dist import run_description
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.runtime import Runtime
from tests.unit.test_imports import REPO_ROOT


@pytest.fixture
def describe(tmp_path):
    tables = types.SimpleNamespace(plan="the plan", weights=dict, width=4)
    trainer = types.SimpleNamespace(
        manifest=None,
        components=types.SimpleNamespace(tables=tables),
        model=torch.nn.Linear(1, 1),
        loader=types.SimpleNamespace(steps_per_epoch=1),
        total_steps=1,
        warmup_steps=0,
        start=None,
    )

    def call(gin_text: str, seed: int, start: str | None = None) -> None:
        trainer.start = start
        trainer.run = RunConfig("pretrain", "data", str(tmp_path), seed=seed)
        run_description.write(gin_text, trainer, Runtime(0, 1, 0, torch.device("cpu")))

    return call


def test_a_full_disk_leaves_the_description_that_was_there(describe, tmp_path):
    """run_config.json says where the checkpoints are: half of it, and no command finds them any more."""
    describe("first", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(before["run_config.json"])["seed"] == 1 and before["config.gin"] == b"first"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            describe("first", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content, name


def test_a_run_says_which_file_made_its_model(describe, tmp_path, monkeypatch, caplog):
    plugin = tmp_path / "my model.py"
    plugin.write_text("WIDTH = 1")
    monkeypatch.setitem(sys.modules, "gpsd_plugin", types.SimpleNamespace(__file__=str(plugin)))
    monkeypatch.setattr(logging.getLogger("gpsd_dist"), "propagate", True)
    describe("first", 1)
    before = json.loads((tmp_path / "environment.json").read_text())
    assert before["plugin"] == str(plugin) and len(before["plugin_sha256"]) == 64
    describe("again", 1, start="step_00000001")
    assert "has changed" not in caplog.text
    plugin.write_text("WIDTH = 2")
    describe("edited", 1, start="step_00000001")
    assert f"{plugin} has changed since this run was begun" in caplog.text
    monkeypatch.delitem(sys.modules, "gpsd_plugin")
    describe("one of ours", 1)
    assert "plugin" not in json.loads((tmp_path / "environment.json").read_text())


COMMANDS = sorted(
    str(path.relative_to(REPO_ROOT))
    for package in ("gpsd_dist", "data_pipeline")
    for path in (REPO_ROOT / package).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_that_is_started_as_a_file_says_how_it_is_started(path, tmp_path):
    found = subprocess.run([sys.executable, REPO_ROOT / path], cwd=tmp_path, capture_output=True, text=True)
    module = path.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    assert found.returncode == 1
    assert found.stderr == f"error: start it as a module, in the root of the repository: python -m {module} ...\n"
