"""The doctor finds what is broken, says how to mend it, and never crashes itself."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from gpsd_dist.doctor import __main__ as doctor
from gpsd_dist.doctor import operations

REPO_ROOT = pathlib.Path(__file__).resolve().parents[3]
PINS = {"torch": "2.13.0", "torchrec": "1.8.0"}
SOUND = dict.fromkeys(doctor.DEPENDENCIES, "1.0") | {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu-cpu": "1.8.0",
}
del SOUND["fbgemm-gpu"]


def run_doctor(python_path: pathlib.Path) -> tuple[int, dict[str, dict]]:
    """Runs the command line with `python_path` in front of the installed packages."""
    env = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{python_path}{os.pathsep}{REPO_ROOT}",
    }
    command = [sys.executable, "-m", "gpsd_dist.doctor", "--json"]
    result = subprocess.run(command, env=env, cwd=python_path, capture_output=True, text=True, timeout=150)
    assert result.stdout.startswith("{"), result.stderr
    report = json.loads(result.stdout)
    assert report["healthy"] == (result.returncode == 0)
    return result.returncode, {check["name"]: check for check in report["checks"]}


def test_missing_module_is_reported_and_the_rest_still_runs(tmp_path):
    (tmp_path / "torchrec.py").write_text("raise ModuleNotFoundError('No module named torchrec (stub)')\n")
    (tmp_path / "rich.py").write_text("raise ImportError('stub')\n")
    returncode, checks = run_doctor(tmp_path)
    assert returncode == 1
    assert checks["torchrec op"]["status"] == doctor.FAILED
    assert "stub" in checks["torchrec op"]["detail"]
    assert ".ci/setup_venv.sh" in checks["torchrec op"]["fix"] or "make setup" in checks["torchrec op"]["fix"]
    others = [name for name in operations.OPERATIONS if name != "torchrec op"]
    assert [name for name in others if checks[name]["status"] != doctor.OK] == []
    assert checks["torchrun"]["status"] == doctor.OK


def test_every_operation_works_here_in_process():
    for name, (distribution, operation) in operations.OPERATIONS.items():
        check = doctor.check_operation(name, distribution, operation, "reinstall")
        assert check.status == doctor.OK, check


def test_broken_package_is_uninstalled_first():
    def operation() -> str:
        raise OSError("libfoo.so: undefined symbol\nmore")

    check = doctor.check_operation("foo op", "foo", operation, "make setup")
    assert check.status == doctor.FAILED
    assert check.detail == "OSError: libfoo.so: undefined symbol"
    assert check.fix == f"{sys.executable} -m pip uninstall -y foo && make setup"


def test_both_builds_of_fbgemm_get_the_exact_commands(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (check,) = doctor.check_fbgemm(SOUND | {"fbgemm-gpu": "1.8.0"}, "cuda")
    assert check.status == doctor.FAILED
    assert check.fix == (
        f"{sys.executable} -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
        f" && {sys.executable} -m pip install --no-deps fbgemm-gpu-cpu==1.8.0"
    )


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, doctor.OK),
        ({"torch": "2.11.0+cpu", "torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.6.0"}, doctor.OK),
        ({"torch": "2.11.0+cpu"}, doctor.FAILED),
        ({"torchrec": "1.6.1"}, doctor.FAILED),
        ({"torch": "2.12.0"}, doctor.WARNING),
    ],
)
def test_versions_that_do_not_belong_together_fail(changes, status):
    assert doctor.check_fbgemm(SOUND | changes, "cpu")[-1].status == status


def test_cuda_fbgemm_with_cpu_torch_fails():
    versions = {name: version for name, version in SOUND.items() if name != "fbgemm-gpu-cpu"} | {"fbgemm-gpu": "1.8.0"}
    assert doctor.check_fbgemm(versions, "cuda")[-1].name == "torch build"


def test_no_fbgemm_fails():
    (check,) = doctor.check_fbgemm({"torch": "2.13.0"}, "cpu")
    assert check.status == doctor.FAILED and check.fix


def test_version_is_compared_with_the_pin_without_build_label():
    def status_of(versions: dict[str, str]) -> str:
        checks = {check.name: check for check in doctor.check_versions(versions, PINS, "make setup")}
        assert all(check.fix for check in checks.values() if check.status != doctor.OK)
        return checks["torch"].status

    assert status_of({"torch": "2.13.0+cpu"}) == doctor.OK
    assert status_of({"torch": "2.11.0"}) == doctor.WARNING
    assert status_of({}) == doctor.FAILED


def test_pins_are_read_from_the_lock_of_the_flavor():
    assert doctor.pinned_versions("cpu")["fbgemm-gpu-cpu"] == doctor.pinned_versions("cuda")["fbgemm-gpu"]
    assert doctor.pinned_versions("cpu").keys() >= set(doctor.DEPENDENCIES) - {"fbgemm-gpu"}


def test_every_dependency_of_the_package_is_checked():
    text = (REPO_ROOT / "pyproject.toml").read_text()
    needed = {re.split(r"[\[><=]", one)[0] for one in tomllib.loads(text)["project"]["dependencies"]}
    assert needed <= set(doctor.DEPENDENCIES)


def test_torchrun_that_is_not_on_path_gets_the_export(monkeypatch, tmp_path):
    (tmp_path / "torchrun").touch()
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    check = doctor.check_torchrun("make setup")
    assert (check.status, check.fix) == (doctor.FAILED, f'export PATH="{tmp_path}:$PATH"')


def test_folder_that_cannot_be_written_fails(tmp_path):
    assert doctor.check_writable(tmp_path).status == doctor.OK
    assert doctor.check_writable(tmp_path / "absent").status == doctor.FAILED


def test_exit_status_and_report_follow_the_checks(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "run_checks", lambda: [doctor.Check("a", doctor.WARNING, "slow [red]", "buy a faster one")]
    )
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "slow [red]" in printed and "fix: buy a faster one" in printed and "1 warnings, 0 failed" in printed
    monkeypatch.setattr(doctor, "run_checks", lambda: [doctor.Check("a", doctor.FAILED, "gone", "bring it back")])
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


@pytest.mark.parametrize(
    ("release", "status"), [("12.8", doctor.WARNING), ("12.9", doctor.WARNING), ("13.3", doctor.OK)]
)
def test_an_assembler_that_miscompiles_is_named(tmp_path, monkeypatch, release, status):
    tool = tmp_path / "ptxas"
    tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    [check] = doctor.check_ptxas()
    assert check.status == status and f"ptxas {release} at {tool}" in check.detail


def test_a_missing_assembler_is_no_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "none"))
    assert doctor.check_ptxas() == []


@pytest.mark.parametrize(
    ("flavor", "versions", "uninstalled"),
    [
        ("cuda", {"torch": "2.13.0+cpu"}, ["torch"]),  # as it comes with the extra `serve`: pip would keep it
        ("cuda", {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}, ["torch", "fbgemm-gpu-cpu"]),
        ("cpu", {"torch": "2.13.0", "fbgemm-gpu": "1.8.0"}, ["torch", "fbgemm-gpu"]),
        ("cpu", {"torch": "2.13.0+cpu"}, []),
        ("cuda", {"torch": "2.13.0", "fbgemm-gpu": "1.8.0"}, []),
    ],
)
def test_the_engine_of_the_other_flavor_goes_first(flavor, versions, uninstalled):
    *first, install = doctor.engine_commands(flavor, versions)
    assert [command[3:] for command in first] == ([["uninstall", "-y", *uninstalled]] if uninstalled else [])
    assert install[3:5] == ["install", "--no-deps"] and install[-1].endswith(f"engine-{flavor}.txt")
