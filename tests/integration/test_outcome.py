"""What a run shows on a terminal: a bar and log lines that do not run into each other, and how it ended."""

import os
import pathlib
import pty
import re
import subprocess
import sys

import pytest

from gpsd_dist.baselines.registry import evaluate_baseline
from tests.helpers.commands import TINY_GIN, environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT_S = 150
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d rank 0 [IW] ")


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Runs a command with its output on a pseudo terminal; returns status and everything written."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(TERM="xterm", COLUMNS="100"), stdout=theirs, stderr=theirs, stdin=theirs
    ) as child:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
            if not part:
                break
            written += part
        status = child.wait(TIMEOUT_S)
    os.close(ours)
    return status, written.decode()


@pytest.fixture(scope="module")
def shown(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("outcome")
    (folder / "tiny.gin").write_text(TINY_GIN + "EPOCHS = 20\nPATIENCE = 1\n")
    command = [sys.executable, "-m", "gpsd_dist.train", "--gin_file", "configs/stage/finetune.gin"]
    command += ["--gin_file", str(folder / "tiny.gin"), f"--gin.DATA_DIR={data_dir}"]
    command += [f"--gin.OUTPUT_DIR={folder / 'nt'}", "--gin.TrainConfig.warmup_fraction=0.0"]
    status, written = on_a_terminal(command)
    assert status == 0, written
    return written


def test_bar_and_log_lines_are_not_glued(shown):
    pieces = [ESCAPE.sub("", piece) for piece in re.split(r"[\r\n]+", shown)]
    lines = [piece for piece in pieces if "rank 0" in piece]
    assert len(lines) > 10 and all(LOG_LINE.match(line) for line in lines)
    assert not [line for line in lines if "examples/s" in line]  # the numbers of log steps are in the bar alone
    assert len(set(lines)) == len(lines)


def test_the_bar_ends_at_100_percent_where_the_run_stopped(shown):
    bars = re.findall(r"(\d+)% (\d+)/(\d+) steps", ESCAPE.sub("", shown))
    stop, planned = re.search(r"stopped early at step (\d+) of (\d+)", shown).groups()
    assert bars[-1] == ("100", stop, stop) and int(stop) < int(planned) == int(bars[0][2])


def test_the_end_says_why_how_good_and_what_next(shown, data_dir):
    text = ESCAPE.sub("", shown).replace("\r", "")
    end = text[text.index("stopped early at step") :]
    assert re.match(r"stopped early at step \d+ of \d+: no better valid click/auc for 1 looks\n", end)
    found = re.search(r"best valid click/auc (0\.\d+) \+- (0\.\d+) \((\d+) of (\d+) candidates are positive\)", end)
    rates, popularity = (evaluate_baseline(name, data_dir, "valid")["click"]["auc"] for name in ("rates", "popularity"))
    assert f"without a model: smoothed rates {rates:.5f}, popularity {popularity:.5f}\n" in end
    assert "too thin to tell: valid knows an AUC to +- " in end and float(found[2]) > 0.05  # 60 candidates
    assert end.strip().endswith("/nt/test.json") and "next: python -m gpsd_dist.evaluate --checkpoint" in end
