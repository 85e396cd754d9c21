"""Hostile overrides and files: a run configuration or one error; nothing is imported, called or opened."""

import contextlib
import functools
import pathlib
import sys
import tempfile

import pytest
from hypothesis import strategies as st

from gpsd_dist import config
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.train import main
from tests.fuzz.properties import assert_one_error_line, clean_or_one_error, fuzz

BASE = ["--gin_file", "configs/stage/finetune.gin", "--gin_file", "configs/data/grocery.gin", "--gin.OUTPUT_DIR=runs/a"]
CLASSES = [cls.__name__ for cls in config.GIN_CLASSES]
MACROS = ["SEED", "WIDTH", "DATA_DIR", "STRATEGY", "TRANSFER_TABLES", "DENSE_LR", "EPOCHS", "NOPE"]
FIELDS = ["TrainConfig.epochs", "TrainConfig.bf16", "RunConfig.data", "ModelConfig.name", "dense/OptimizerConfig.eps"]
ODD_NAMES = [
    "gin.macro",
    "gin.singleton.constructor",
    "os.system",
    "nope/TrainConfig.epochs",
    "TrainConfig",
    "import",
    "include",
]
NAMES = st.sampled_from([*MACROS, *FIELDS, *ODD_NAMES]) | st.text(max_size=12)
CALLS = [
    "os.system()",
    "gin.singleton()",
    "gin.constant()",
    "macro",
    "eval('1')",
    "builtins.exec()",
    "print",
    "gin.config",
]
REFERENCES = [
    f"{sign}{name}" for sign in "@%" for name in [*CALLS, *MACROS, *CLASSES, "gin.REQUIRED", "", "/", "a/b/c"]
]
PYTHON = [
    "__import__('os').system('true')",
    "lambda: 1",
    "[x for x in ()]",
    "9**9**9",
    "'a' * 10**9",
    "f'{1}'",
    "...",
    "0x" + "f" * 9,
]
TAILS = [
    "",
    "\nimport os",
    "\nfrom os import system",
    "\ninclude '/etc/passwd'",
    "\ninclude 'configs/base.gin'",
    "\r",
    "\f",
    "\\",
    "#",
    "\n\n",
]
VALUES = (
    st.sampled_from(
        [*REFERENCES, *PYTHON, "('item',)", "{}", "None", "1e999", "-1", "1" * 400, "'", '"""', "(" * 300, "-" * 9000]
    )
    | st.text(max_size=20)
    | st.recursive(
        st.integers() | st.floats() | st.text(max_size=4) | st.none(), lambda inner: st.lists(inner, max_size=3)
    ).map(repr)
)
OVERRIDES = st.builds(lambda name, value, tail: f"--gin.{name}={value}{tail}", NAMES, VALUES, st.sampled_from(TAILS))

_events: list[list[str]] = []


def _hook(event: str, arguments: tuple) -> None:
    if _events and event in ("import", "os.system", "exec", "subprocess.Popen", "open", "socket.connect"):
        _events[-1].append(f"{event} {arguments[0]!r:.200}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def _nothing_happens():
    """No import, no call of the shell, no file but configurations."""
    _events.append([])
    try:
        yield
    finally:
        happened = _events.pop()
    assert not [event for event in happened if "passwd" in event or event.startswith(("os.", "subprocess", "socket"))]
    imported = [event for event in happened if event.startswith("import")]
    assert not [event for event in imported if "antigravity" in event or "hostile" in event]


@functools.cache
def _warm() -> None:
    """What parsing imports by itself is imported before anything is watched."""
    load_run_config(BASE)


@fuzz(150, overrides=st.lists(OVERRIDES, min_size=1, max_size=2))
def test_any_override(overrides):
    _warm()
    with _nothing_happens(), clean_or_one_error() as errors:
        run = load_run_config([*BASE, *overrides]).run
        assert isinstance(run, config.RunConfig)
    assert not errors or len(str(errors[0])) < 20_000


@fuzz(
    150,
    arguments=st.lists(
        st.text(max_size=10) | st.sampled_from(["--gin_file", "--gin.", "--gin.SEED", "-h", "--gin_file=/", "\0"]),
        max_size=3,
    ),
)
def test_any_argument(arguments):
    """argparse itself ends the program with its usage and status 2 (0 for -h)."""
    _warm()
    with (
        clean_or_one_error(),
        open("/dev/null", "w") as null,
        contextlib.redirect_stderr(null),
        contextlib.redirect_stdout(null),
    ):
        try:
            load_run_config([*BASE, *arguments])
        except SystemExit as stop:
            assert stop.code == 2 or (stop.code == 0 and {"-h", "--help"} & set(arguments))


LINES = st.sampled_from(
    [
        "import antigravity",
        "from os import path",
        "import os.path as p",
        "from __gin__ import dynamic_registration",
        "include 'configs/base.gin'",
        "include 'configs/stage/finetune.gin'",
        "include '/etc/passwd'",
        "include '../x.gin'",
        "SEED = 1",
        "SEED = %SEED",
        "WIDTH = @os.system()",
        "TrainConfig:\n  epochs = 3",
        "TrainConfig:",
        "gin.macro.value = 1",
        "dense/OptimizerConfig.eps = 1e-9",
        "dence/OptimizerConfig.eps = 1e-9",
        "EMBEDING_DIM = 128",
        "x = [1,",
        "\t",
        "# c",
        '"""',
        "x: y = 1",
        "TrainConfig.epochs = 3",
        "os.system.command = 'true'",
        "OUTPUT_DIR = 'a'",
        "RunConfig.train = @TrainConfig",
    ]
) | st.text(max_size=15)


@fuzz(150, lines=st.lists(LINES, max_size=4), is_first=st.booleans())
def test_any_file(lines, is_first):
    _warm()
    with tempfile.TemporaryDirectory(prefix="fuzz_gin_") as folder, _nothing_happens(), clean_or_one_error():
        path = pathlib.Path(folder) / "hostile_leaf.gin"
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
        files = ["--gin_file", str(path), *BASE] if is_first else [*BASE, "--gin_file", str(path)]
        load_run_config(files)


@pytest.mark.parametrize(
    "value", ["%SEED\nimport hostile", "@TrainConfig()\nimport hostile", "@gin.singleton()", "@os.system()"]
)
def test_an_override_cannot_import_or_call(tmp_path, monkeypatch, capsys, value):
    """Before: what followed a line break after % or @ was run by gin, an import too."""
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    status = main([*BASE, f"--gin.SEED={value}"])
    assert_one_error_line(status, capsys.readouterr().err)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "line", ["import hostile", "from hostile import x", "from __gin__ import dynamic_registration\nimport hostile"]
)
def test_a_file_cannot_import(tmp_path, monkeypatch, line):
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    (tmp_path / "leaf.gin").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="a configuration imports nothing"):
        load_run_config([*BASE, "--gin_file", str(tmp_path / "leaf.gin")])
    assert not (tmp_path / "proof").exists() and "hostile" not in sys.modules
