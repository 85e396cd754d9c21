"""A build that is killed at any file operation changes nothing that can be read; the next build works."""

import os
import pathlib
import shutil
import signal
import sys

import pytest

from data_pipeline import build, validate
from gpsd_dist.data import data_versions
from tests.assets.cases import logs
from tests.unit.data_pipeline.conftest import run

OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree", "open")
DAY_S = 86_400
SCHEMA = (
    '[exposure]\nfiles = "shown.csv"\nuser = "user_id"\nitem = "item_id"\ntime = "ts"\n'
    'task = [{ column = "click" }]\nextends_history = "click"\n[split]\n'
    "valid_from = 2023-11-16\ntest_from = 2023-11-17\ntest_until = 2023-11-18\n"
)


def log_until(folder: pathlib.Path, num_days: int) -> pathlib.Path:
    """Impressions of that many days from 2023-11-14 on."""
    rows = [
        (f"u{n % 7}", f"i{n * n % 11}", 1_699_920_000 + day * DAY_S + n * 600, int(n % 3 == 0))
        for day in range(num_days)
        for n in range(60)
    ]
    return logs.write(folder, SCHEMA, {"shown.csv": logs.lines(rows, "user_id,item_id,ts,click")})


SCENARIOS = {
    "replace": ("--force",),
    "append": ("--append_to",),
    "holdout": ("--split", "holdout"),
    "delete the old one": ("--force", "--keep_versions", "1"),
    "delete one of before": ("--force", "--keep_versions", "1"),
}


def killed_at(number: int, below: pathlib.Path, arguments: list[str]) -> bool:
    """Runs the build in a child that dies at its `number`-th file operation below a folder; False if it got through."""
    child = os.fork()
    if child == 0:
        left = [number]

        def hook(event: str, details: tuple) -> None:
            is_write = event != "open" or (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR))
            if event in OPERATIONS and is_write and str(below) in str(details[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        os._exit(build.main(arguments))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def first_builds(folder: pathlib.Path, scenario: str) -> tuple[pathlib.Path, list[str]]:
    """Builds what the scenario starts from; returns its folder, and the arguments of the build that is killed."""
    target = folder / "place" / "out"
    common = ["--source", "generic", "--out_dir", str(target)]
    assert run(*common, "--raw_dir", log_until(folder / "early", 4)) == 0
    options, later = SCENARIOS[scenario], log_until(folder / "later", 5)
    if scenario == "append":
        options = (*options, str(target))
    return target, [*common, "--raw_dir", str(later), *options]


def content(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_kills(tmp_path: pathlib.Path, scenario: str, step: int) -> None:
    target, arguments = first_builds(tmp_path, scenario)
    is_plain = scenario == "delete one of before"  # there were versions
    name = "" if is_plain else data_versions.current(target).relative_to(target)
    shutil.copytree(data_versions.current(target) if is_plain else target, tmp_path / "before")
    before = content(tmp_path / "before" / name)
    number, num_killed = 1, 0
    while True:
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "before", target)
        if not killed_at(number, target.parent, arguments):
            break
        num_killed += 1
        validate.check(target)
        is_old = data_versions.current(target) == target / name
        if is_old or "--keep_versions" not in arguments:  # a reader that opened it before the build reads all of it
            assert {path: (target / name / path).read_bytes() for path in before} == before
        assert run(*[word for word in arguments if word != "--force"]) == 0
        validate.check(target)
        assert os.listdir(target.parent) == ["out"]
        assert is_plain or set(os.listdir(target)) == {"current.json", "versions"}
        assert not [left for left in os.listdir(target / "versions") if left.startswith(".")]
        number += step
    assert num_killed >= 10 // step


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_some_file_operations(tmp_path, scenario):
    check_kills(tmp_path, scenario, step=9)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_every_file_operation(tmp_path, scenario):
    check_kills(tmp_path, scenario, step=1)
