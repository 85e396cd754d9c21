"""measure_gpu.sh: everything that it names exists and nothing is missing; a broken kit costs only what needs it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import gpu_suite
from tests.helpers import forked

ROOT = pathlib.Path(__file__).parents[3]
SCRIPT = ROOT / "benchmarks/measure_gpu.sh"
COMMANDS = re.sub(r"\\\n\s*", "", SCRIPT.read_text()).splitlines()
MEASURED = [line.split()[1:] for line in COMMANDS if line.split()[:1] == ["measure"]]  # [group, seconds, parts]
CHECKED = [line.split()[1:] for line in COMMANDS if line.split()[:1] == ["check"]]  # [group, seconds, test file...]
NEEDS_NO_FBGEMM = ["attention", "hstu_tests", "hstu"]
FAKE_PYTHON = """#!{python}
import json, os, sys
if "--version" not in sys.argv:
    with open({calls!r}, "a") as file:
        print(json.dumps(sys.argv[1:]), file=file)
sys.exit({fails!r} in " ".join(sys.argv))
"""


def test_every_part_of_the_suite_is_measured_once_in_its_order():
    assert [part for _, _, parts in MEASURED for part in parts.split(",")] == list(gpu_suite.NAMES)


def test_every_file_with_a_gpu_test_is_run():
    marked = {
        str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py") if "@pytest.mark.gpu\n" in p.read_text()
    }
    named = [file for _, _, *files in CHECKED for file in files]
    assert sorted(named) == sorted(marked)


def test_gpu_tests_are_collected_without_the_libraries_of_other_parts():
    """Where it measures there may be no ibis, duckdb or lightgbm."""
    files = [file for _, _, *files in CHECKED for file in files]
    code = f"""
import sys, pytest
sys.exit(pytest.main(["-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *{files}]))
"""
    done = forked.run("tests.helpers.without", "ibis,duckdb,lightgbm,pyspark", code)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        assert f"{file}::" in done.stdout, file


def run_script(tmp_path, *, fails="no such word", limit_s=585, only=""):
    """Runs it with a Python that only notes its calls and fails at one word; -> (exit status, log, calls)."""
    programs, calls = tmp_path / "programs", tmp_path / "calls.jsonl"
    programs.mkdir()
    calls.touch()
    (programs / "python3").write_text(FAKE_PYTHON.format(python=sys.executable, calls=str(calls), fails=fails))
    (programs / "python3").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OUT": str(tmp_path / "out"),
        "KIT": str(tmp_path / "kit"),
        "LIMIT_S": str(limit_s),
        "ONLY": only,
    }
    done = subprocess.run([SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    log = (tmp_path / "out/log.txt").read_text()
    assert log == done.stdout
    return done.returncode, log, [json.loads(line) for line in calls.read_text().splitlines()]


def groups(log):
    """Groups that were started."""
    return re.findall(r"== (\w+): starts", log)


def test_all_groups_run_and_write_below_out(tmp_path):
    status, log, calls = run_script(tmp_path)
    assert status == 0 and sorted(groups(log)) == sorted(group for group, *_ in MEASURED + CHECKED)
    suites = [call for call in calls if "benchmarks.run" in call]
    assert [call[call.index("--out") + 1] for call in suites] == [f"{tmp_path}/out/{g}.json" for g, *_ in MEASURED]


@pytest.mark.parametrize("cause", ["broken archive", "does not load"])
def test_a_failing_kit_costs_only_what_needs_it(tmp_path, cause):
    if cause == "broken archive":
        (tmp_path / "kit").mkdir()
        (tmp_path / "kit/fbgemm_gpu-1.6.0.tar.xz").write_bytes(b"no archive")
    status, log, _ = run_script(tmp_path, fails="fbgemm_gpu")
    assert status == 1 and groups(log) == NEEDS_NO_FBGEMM
    assert "== FBGEMM or TorchRec does not work here" in log and "failed: FBGEMM" in log
    assert ("failed: unpacking" in log) == (cause == "broken archive")


def test_a_failing_group_does_not_end_the_others(tmp_path):
    status, log, _ = run_script(tmp_path, fails="lookup,host_syncs")
    assert status == 1 and len(groups(log)) == len(MEASURED + CHECKED)
    assert log.count("== failed:") == 1 and "== failed: lookup\n" in log and "cut" not in log


def test_what_has_no_time_left_is_named_and_the_next_call_goes_on_with_it(tmp_path):
    """A group that does not fit is cut, and a shorter one behind it runs."""
    (tmp_path / "first").mkdir()
    status, log, _ = run_script(tmp_path / "first", limit_s=115)
    fitting = [group for group, seconds, *_ in MEASURED + CHECKED if int(seconds) <= 90]
    assert status == 1 and "== failed" not in log and sorted(groups(log)) == sorted(fitting)
    [only] = re.findall(r'== cut, for the next call: ONLY="([\w ]+)" benchmarks/measure_gpu.sh', log)
    assert sorted([*only.split(), *fitting]) == sorted(group for group, *_ in MEASURED + CHECKED)
    (tmp_path / "second").mkdir()
    status, log, _ = run_script(tmp_path / "second", only=only)
    assert status == 0 and groups(log) == only.split() and "cut" not in log


def test_a_group_that_does_not_exist_is_refused(tmp_path):
    status, log, _ = run_script(tmp_path, only="attention l42")
    assert status == 1 and groups(log) == ["attention"]
    assert "failed: ONLY names l42, which is no group; there are lookup l4 l24" in log


def test_the_limits_of_the_goals_fit_into_one_call():
    goals = [int(seconds) for _, seconds, parts in MEASURED if set(parts.split(",")) & set(gpu_suite.GOALS)]
    assert sum(goals) < 300 and all(0 < int(seconds) <= 200 for _, seconds, *_ in MEASURED + CHECKED)
