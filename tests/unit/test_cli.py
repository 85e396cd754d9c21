"""The program `gpsd-dist`: its table of commands, what it hands on, how it names commands, what is not installed."""

import errno
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tomllib

import pytest

from gpsd_dist import launcher, train
from gpsd_dist.cli import main as cli
from gpsd_dist.cli import missing, names
from tests.unit.test_imports import REPO_ROOT

FINETUNE = ("--gin_file", "configs/stage/finetune.gin", "--gin.DATA_DIR=x", "--gin.OUTPUT_DIR=y")


@pytest.fixture
def started(monkeypatch):
    """What main() changes in this process is put back."""
    monkeypatch.setenv(names.STARTED_BY, "")
    monkeypatch.setenv(names.PLUGIN, "")
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", sys.argv)


def run(*command: str, code: str = "") -> subprocess.CompletedProcess:
    start = ["-c", code] if code else ["-m", "gpsd_dist"]
    return subprocess.run(
        [sys.executable, *start, *command], cwd=REPO_ROOT, capture_output=True, text=True, timeout=120
    )


def test_help_is_a_line_per_command_and_quick():
    code = "import sys; from gpsd_dist.cli.main import main; print(*sys.modules if not main(['--help']) else ())"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(code=code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^  ([a-z]\S*)  +\S", result.stdout, re.MULTILINE) == list(names.COMMANDS)
    modules = set(result.stdout.splitlines()[-1].split())
    assert not modules & {"torch", "numpy", "pyarrow", "pydantic", "rich", "gin", "ibis"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("name", names.COMMANDS)
def test_every_command_is_there(name):
    module = names.COMMANDS[name].module
    spec = importlib.util.find_spec(module)
    assert spec is not None
    is_package = spec.submodule_search_locations is not None
    assert not is_package or importlib.util.find_spec(f"{module}.__main__") is not None
    assert len(names.COMMANDS[name].summary) < 100


@pytest.mark.parametrize(("typed", "words"), [("tarin", "did you mean 'train'?"), ("zzz", "gpsd-dist --help lists")])
def test_a_misspelt_command_is_told_what_was_meant(typed, words, capsys, started):
    assert cli.main([typed]) == 2
    assert words in capsys.readouterr().err


def test_output_names_commands_as_they_were_typed(monkeypatch):
    text = "usage: python -m gpsd_dist.train; torchrun --nproc_per_node 2 -m gpsd_dist.train --gin.X=1\n"
    text += "python -m data_pipeline.build --out_dir a, python -m gpsd_dist.serving.request_log D."
    monkeypatch.setenv(names.STARTED_BY, "")
    assert names.as_typed(text) == text
    monkeypatch.setenv(names.STARTED_BY, names.PROGRAM)
    assert names.as_typed(text) == (
        "usage: gpsd-dist train; gpsd-dist train --nproc 2 --gin.X=1\n"
        "gpsd-dist build --out_dir a, python -m gpsd_dist.serving.request_log D."
    )
    long = "python -m gpsd_dist.launcher --nproc_per_node 2 --standalone -m gpsd_dist.evaluate --split test"
    assert names.as_typed(long) == "gpsd-dist evaluate --nproc 2 --split test"


def test_help_of_a_command_says_how_it_was_started():
    result = run("evaluate", "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: gpsd-dist evaluate [-h]"), result.stderr
    assert "python -m" not in result.stdout and "gpsd-dist evaluate --baseline gbdt" in result.stdout
    indent = " " * len("usage: gpsd-dist evaluate ")
    assert result.stdout.splitlines()[1].startswith(f"{indent}(--checkpoint") and "\nScores one split" in result.stdout


def test_several_processes_go_to_the_launcher(monkeypatch, started):
    got: list[list[str]] = []
    monkeypatch.setattr(launcher, "main", lambda argv: got.append(argv) or 0)
    assert cli.main(["train", "--nproc", "2", *FINETUNE, "--max_restarts=3"]) == 0
    assert cli.main(["train", *FINETUNE, "--max_restarts", "3"]) == 0  # one process is restarted, too
    how = [["--nproc_per_node", n, "--standalone", "--max_restarts", "3", "-m", "gpsd_dist.train"] for n in "21"]
    assert got == [[*each, *FINETUNE] for each in how]


def test_threads_are_shared_before_a_plugin_imports_torch(monkeypatch, started):
    seen = []
    monkeypatch.setattr(train, "parse", lambda options: seen.append(os.environ.get("OMP_NUM_THREADS")))
    monkeypatch.setattr(launcher, "main", lambda argv: 0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6))
    assert cli.main(["train", "--nproc", "2"]) == 0 and seen == ["3"]


def test_a_file_that_cannot_be_read_now_is_no_mistake(monkeypatch, capsys, started):
    def fail(options):
        raise OSError(errno.EIO, "Input/output error", "a\x1b.gin")

    monkeypatch.setattr(train, "parse", fail)
    assert cli.main(["train", "--nproc", "2"]) == 74
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\x1b" not in said


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "--artefact", "a", "--requests", "r", "--out", "o"),
        ("evaluate", "--baseline", "gbdt", "--data", "d"),
    ],
)
def test_what_one_process_scores_is_refused_on_several(command, capsys, started):
    assert cli.main([*command, "--nproc", "2"]) == 2
    assert f"{command[1]} is scored by one process: leave out --nproc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nproc", "0"), "--nproc 0: expected a whole number, 1 or more"),
        (("--nproc",), "--nproc (nothing)"),
        (("--nproc", "2", "--max_restarts", "x"), "--max_restarts x"),
        (("--nproc", "2", *FINETUNE, "--gin.LAYRES=2"), "did you mean 'LAYERS'"),
        (("--nproc", "2", *FINETUNE, "--gin.STAGE=finetnue"), "did you mean 'finetune'"),
        (("--plugin", "nowhere.py", *FINETUNE), "--plugin nowhere.py: expected a Python file"),
    ],
)
def test_a_mistake_is_one_line_before_any_process_is_started(options, words, capsys, started):
    assert cli.main(["train", *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and "Traceback" not in said


WITHOUT = """
import contextlib, io, json, sys
blocked, lines = json.loads(sys.argv[1])
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
from gpsd_dist.cli.main import main
for line in lines:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(line)
    print(json.dumps([status, said.getvalue()]))
"""


@pytest.mark.parametrize(
    ("blocked", "lines", "fix"),
    [
        (
            ["torch", "torchrec", "fbgemm_gpu"],
            [
                ["train", *FINETUNE],
                ["train", "--nproc", "2", *FINETUNE],
                ["fit", "--data", "x", "--out", "y"],
                ["evaluate", "--checkpoint", "a"],
                ["predict", "--checkpoint", "a", "--out", "b"],
                ["export", "--checkpoint", "a", "--data", "b", "--out", "c"],
                ["index", "build", "--checkpoint", "a", "--data", "b", "--out", "c"],
            ],
            "gpsd-dist doctor --fix cpu",
        ),
        (["torch", "torchrec", "fbgemm_gpu"], [["serve", "a", "--port", "0"]], "pip install 'gpsd-dist[serve]'"),
        (["fbgemm_gpu"], [["train", *FINETUNE]], "gpsd-dist doctor --fix cpu"),
        (["ibis"], [["build", "--source", "generic", "--raw_dir", "a", "--out_dir", "b"]], "gpsd-dist[data]"),
        (["jinja2"], [["report", "a"]], "gpsd-dist[report]"),
    ],
)
def test_what_is_not_installed_is_one_sentence(blocked, lines, fix):
    result = run(json.dumps([blocked, lines]), code=WITHOUT)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(lines)
    for line, (status, said) in zip(lines, answers, strict=True):
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, (line, said)
        assert "is not installed" in said and fix in said, (line, said)


@pytest.mark.parametrize("module", ["build", "inspect", "validate"])
def test_a_module_that_python_starts_says_it_in_the_same_sentence(module):
    """Its imports fail before `main` is there to explain them."""
    code = f"import runpy; runpy.run_module('data_pipeline.{module}', run_name='__main__')"
    command = [sys.executable, "-m", "tests.helpers.without", "ibis,duckdb", code]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: ibis is not installed, which this needs: pip install 'gpsd-dist[data]'\n"


def test_every_extra_that_a_message_names_is_one_of_the_package():
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    assert {*missing.EXTRAS.values()} <= project["optional-dependencies"].keys()


def test_another_missing_module_is_no_business_of_ours():
    with pytest.raises(ModuleNotFoundError, match="nothing_of_ours"):
        cli.run_main(lambda argv: importlib.import_module("nothing_of_ours"), [])


def test_the_environment_is_named_for_children(started, capsys):
    assert cli.main(["checkpoint", "list", "nowhere"]) == 2
    assert os.environ[names.STARTED_BY] == "gpsd-dist"
