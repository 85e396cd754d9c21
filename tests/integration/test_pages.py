"""Commands are taken from the pages and run as they stand there, page by page, each in a folder of its own."""

import os
import pathlib
import re
import socket
import subprocess

import pytest

from tests.helpers import pages
from tests.helpers.commands import environment

SMALL = ["--num_users", "600", "--num_items", "1600", "--requests_per_day", "150"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("programs") / "bin"
    pages.write_programs(folder)
    return folder


def run(script: str, folder: pathlib.Path, programs: pathlib.Path, timeout_s: float) -> str:
    """Runs it by bash; the first command that fails ends it. Returns what was written."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    env = environment("PYTHONPATH", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + script.replace("8080", str(port))
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def user_folder(programs, tmp_path_factory) -> pathlib.Path:
    """What a reader of the guide has: a raw log in DIR, and data/mine that was built from it."""
    folder = tmp_path_factory.mktemp("user")
    log = f"gpsd-dist synthesize --out_dir DIR --format csv {' '.join(SMALL)}"
    run(f"{log}\ngpsd-dist build --source generic --raw_dir DIR --out_dir data/mine", folder, programs, 120)
    return folder


FAST = [page for page in pages.PAGES if pages.marked_blocks(page, with_slow=False)]
SLOW = [page for page in pages.PAGES if pages.has_slow_blocks(page)]


def test_pages_have_commands_that_are_run():
    assert {page.name for page in FAST} >= {"install.md", "inspect.md", "clusters.md"}
    assert {page.name for page in SLOW} >= {"README.md", "tutorial.md", "train.md"}


@pytest.mark.parametrize("page", FAST, ids=lambda page: page.relative_to(pages.REPO_ROOT).as_posix())
def test_commands_of_a_page_run(page, programs, user_folder):
    assert run("\n".join(pages.marked_blocks(page, with_slow=False)), user_folder, programs, 170)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.relative_to(pages.REPO_ROOT).as_posix())
def test_all_commands_of_a_page_run(page, programs, user_folder, tmp_path):
    folder = tmp_path if page.name == "tutorial.md" else user_folder  # the tutorial begins with nothing
    assert run("\n".join(pages.marked_blocks(page, with_slow=True)), folder, programs, 3500)


def test_a_failing_command_is_found(programs, tmp_path):
    with pytest.raises(AssertionError, match="did you mean 'serve'"):
        run("gpsd-dist srve\necho gone on", tmp_path, programs, 60)


def test_commands_of_the_pages_have_only_options_that_there_are(programs, tmp_path):
    """Also those that are not run: every `gpsd-dist COMMAND --option` of every page."""
    calls = [call for page in pages.PAGES for call in pages.program_calls(page)]
    used: dict[tuple[str, ...], set[str]] = {}
    for command, *rest in calls:
        name = (command, rest[0]) if rest and rest[0] in ("list", "verify", "diff", "prune") else (command,)
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        used.setdefault(name, set()).update(option for option in options if "gin." not in option)
    assert len(calls) > 20 and ("train",) in used
    for name, options in used.items():
        asked = " ".join((*name, *(("--source", "generic") if name == ("build",) else ()), "--help"))
        said = "" if name[0].startswith("--") else run(f"gpsd-dist {asked}", tmp_path, programs, 60)
        wrong = {option for option in options if option != "--help" and not re.search(rf"(?<!\S)\[?{option}\b", said)}
        assert not wrong, f"gpsd-dist {' '.join(name)}: no {wrong}"
