"""No command imports torch or TorchRec before its options are accepted: both take seconds. Modules are counted."""

import json
import subprocess
import sys

import pytest

from tests.unit.test_imports import REPO_ROOT

HEAVY = ("torch", "torchrec", "fbgemm_gpu", "scipy", "matplotlib")
FINETUNE = ("--gin_file", "configs/stage/finetune.gin", "--gin.DATA_DIR=x", "--gin.OUTPUT_DIR=y")
CASES = {  # command -> mistakes, each a command line and words of the answer
    "train": [
        ((), "the following arguments are required: --gin_file"),
        ((*FINETUNE, "--gin.LAYRES=2"), "did you mean"),
        ((*FINETUNE, "--gin.STAGE=finetnue"), "did you mean 'finetune'?"),
        ((*FINETUNE, "--gin.EPOCHS=-1"), "epochs"),
    ],
    "evaluate": [(("--baseline", "gbdt"), "--baseline needs --data")],
    "fit": [
        (("--data", "x", "--out", "y", "--nproc", "0"), "--nproc must be at least 1"),
        (("--data", "x", "--out", "y", "--models", "l4h64a5"), "did you mean"),
    ],
    "plan": [
        (("--world_size", "0", "--hbm_gib", "80"), "--world_size 0 must be above 0"),
        (("--world_size", "2", "--hbm_gib", "80", *FINETUNE, "--gin.LAYRES=2"), "did you mean"),
    ],
    "export": [(("--checkpoint", "a", "--data", "b", "--out", "c", "--max_candidates", "0"), "must be at least 1")],
    "scaling": [
        (("--out_dir", "x"), "--ladder, --strategy, --gin_file missing"),
        (("--out_dir", "x", "--ladder", "l1", "--strategy", "XX", "--gin_file", "y"), "is not one of"),
    ],
    "checkpoint": [
        (("list", "nowhere"), "holds no checkpoint"),
        (("verify", "nowhere"), "neither a run folder"),
        (("prune", "nowhere", "--keep_last", "0"), "must be >= 1"),
    ],
    "index": [(("search", "a", "--requests", "b", "--out", "c", "--top", "0"), "must be at least 1")],
    "predict": [(("--artefact", "a", "--out", "b"), "go together")],
    "serve": [(("a", "--port", "-1"), "must be between")],
    "doctor": [(("--nothing",), "unrecognized arguments")],
    "report": [((), "required: RUN_DIR")],
    "quickstart": [(("--nothing",), "unrecognized arguments")],
    "launcher": [],
    "cli.main": [
        (("fti",), "did you mean 'fit'?"),
        (("train", "--nproc", "2", *FINETUNE, "--gin.LAYRES=2"), "did you mean"),
        (("evaluate", "--nproc", "2", "--baseline", "gbdt"), "--baseline needs --data"),
    ],
}
# Runs every command line of one module in this process, and says after each what was imported.
CODE = """
import contextlib, importlib, io, json, sys
module, lines, heavy = json.loads(sys.argv[1])
try:
    main = importlib.import_module(f"gpsd_dist.{module}.__main__").main
except ModuleNotFoundError:
    main = importlib.import_module(f"gpsd_dist.{module}").main
for line in lines:
    sys.argv, said = [module, *line], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(line)
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, said.getvalue(), sorted(set(heavy) & set(sys.modules))]))
"""


@pytest.mark.parametrize("command", CASES)
def test_help_and_refused_options_import_nothing_heavy(command):
    lines = [["--help"], *([*line] for line, _ in CASES[command])]
    request = json.dumps([command, lines, HEAVY])
    found = subprocess.run([sys.executable, "-c", CODE, request], cwd=REPO_ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(answers) == len(lines)
    for line, (status, said, heavy), words in zip(lines, answers, ["", *(w for _, w in CASES[command])], strict=True):
        assert heavy == [], f"{line} imported {heavy}"
        assert (status or 0) == (0 if line == ["--help"] else 2) and words in said, (line, status, said)
