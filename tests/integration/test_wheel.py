"""The wheel, in an environment without the checkout: the commands of the README run in an empty folder.

Real: the wheel, its installation by pip, the script `gpsd-dist`, the processes. Not real: third-party packages are
those of the environment of the tests, which a .pth file adds, because installing torch takes minutes.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SIZE = ["--gin_file", "configs/model/l1h32a4.gin"]
SHORT = ["--gin.EPOCHS=1", "--gin.TrainConfig.max_steps=8"]


class Installed:
    """Runs commands of an environment in a folder that was empty."""

    def __init__(self, home: pathlib.Path):
        self.bin, self.folder = home / "venv" / "bin", home / "work"
        self.folder.mkdir()

    def __call__(self, *command: str, status: int = 0) -> str:
        """Returns what was written; the program is `gpsd-dist` unless the command names another one."""
        names = {"PYTHONPATH", "GPSD_STARTED_BY", "RANK", "WORLD_SIZE"}
        env = {name: value for name, value in os.environ.items() if name not in names}
        env |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        program = [] if command[0] == "python" else ["gpsd-dist"]
        done = subprocess.run(
            [*program, *command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    home = tmp_path_factory.mktemp("wheel")
    for name in ("gpsd_dist", "data_pipeline", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (shutil.copytree if (REPO_ROOT / name).is_dir() else shutil.copy)(REPO_ROOT / name, home / "source" / name)
    build = "import setuptools.build_meta as backend; backend.build_wheel('../dist')"
    subprocess.run([sys.executable, "-c", build], cwd=home / "source", check=True, capture_output=True, timeout=300)
    shutil.rmtree(home / "source")
    (wheel,) = (home / "dist").glob("*.whl")
    venv.create(home / "venv", with_pip=False)
    python = str(home / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True, timeout=300)
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    made = Installed(home)
    assert made("python", "-c", "import gpsd_dist; print(gpsd_dist.__file__)").startswith(str(site))
    return made


@pytest.fixture(scope="module")
def data(installed) -> Installed:
    small = ["--num_users", "600", "--num_items", "1600", "--requests_per_day", "150"]
    installed("python", "-m", "data_pipeline.synthesize", "--out_dir", "raw", *small)
    said = installed("build", "--source", "generic", "--raw_dir", "raw", "--out_dir", "data/mine")
    assert "done in" in said
    return installed


def test_help_version_and_a_misspelt_command(installed):
    assert re.search(r"^  fit  +\S", installed("--help"), re.MULTILINE)
    assert re.fullmatch(r"gpsd-dist \d+\.\d+\.\d+\S*\n", installed("--version"))
    assert "did you mean 'serve'?" in installed("srve", status=2)


def test_only_torchrec_misses_something(installed):
    """Its CUDA build of fbgemm, beside the one for CPUs."""
    pip = [sys.executable, "-m", "pip", "--python", str(installed.bin / "python"), "check"]
    said = subprocess.run(pip, capture_output=True, text=True, timeout=300).stdout
    lines = [line for line in said.splitlines() if "python-dateutil" not in line and "No broken" not in line]
    assert [line for line in lines if not re.match(r"torchrec \S+ requires fbgemm-gpu, ", line)] == []


def test_a_log_is_looked_at_and_fitted(data):
    assert "Splits" in data("inspect", "data/mine")
    files = ["--gin_file", "stage/finetune.gin", "--gin_file", "model/l1h32a4.gin", "--nproc", "1"]
    files += ["--pretrain_gin_file", "stage/pretrain.gin", "--pretrain_gin_file", "model/l1h32a4.gin"]
    short = [*SHORT, *(option.replace("--gin.", "--pretrain_gin.") for option in SHORT)]
    said = data("fit", "--data", "data/mine", "--out", "runs/fit", "--strategies", "NT,FT_SF", *files, *short)
    assert "runs/fit: summary.json, commands.sh, report.html" in said and "python -m" not in said
    assert "\ngpsd-dist train " in (data.folder / "runs/fit/commands.sh").read_text()


def test_training_by_hand_up_to_served_scores(data):
    where = ["--gin.DATA_DIR=data/mine", *SIZE, *SHORT]
    pretrain = ["--gin_file", "configs/stage/pretrain.gin", "--gin.OUTPUT_DIR=runs/mine/pretrain"]
    said = data("train", "--nproc", "2", *pretrain, *where)
    assert "next: gpsd-dist train --gin_file configs/stage/finetune.gin" in said
    run = ["--gin.STRATEGY=ST_SF", "--gin.INIT_CHECKPOINT=runs/mine/pretrain", "--gin.OUTPUT_DIR=runs/mine/st_sf"]
    said = data("train", "--nproc", "2", "--gin_file", "configs/stage/finetune.gin", *run, *where)
    assert "next: gpsd-dist evaluate --checkpoint runs/mine/st_sf" in said
    data("evaluate", "--checkpoint", "runs/mine/st_sf", "--split", "test", "--metrics_out", "runs/mine/st_sf/test.json")
    assert json.loads((data.folder / "runs/mine/st_sf/test.json").read_text())["click"]["rows"] > 0
    data("evaluate", "--baseline", "gbdt", "--data", "data/mine", "--split", "test")
    assert "2 runs" in data("report", "runs/mine", "--out", "report.html")
    assert "gpsd-dist train --nproc 2 " in (data.folder / "report.html").read_text()
    assert "step" in data("checkpoint", "list", "runs/mine/st_sf")
    data("predict", "--checkpoint", "runs/mine/st_sf", "--data", "data/mine", "--out", "scores")
    source = ["--checkpoint", "runs/mine/st_sf", "--data", "data/mine"]
    data("export", *source, "--out", "artefacts/ctr")
    data("export", "parity", "artefacts/ctr", *source)  # starts a server, and compares its answers with `evaluate`


def test_does_it_fit_and_is_the_installation_whole(data):
    files = ["--gin_file", "configs/stage/finetune.gin", "--gin.DATA_DIR=data/mine"]
    assert "item" in data("plan", *files, "--world_size", "2", "--hbm_gib", "80")
    assert json.loads(data("doctor", "--json"))["healthy"]
    assert "pip install --no-deps -r" in data("doctor", "--fix", "cpu")


def test_a_mistake_is_one_line(data):
    said = data("train", "--nproc", "2", "--gin_file", "stage/finetun.gin", status=2)
    assert said.count("\n") == 1 and "did you mean 'configs/stage/finetune.gin'?" in said
