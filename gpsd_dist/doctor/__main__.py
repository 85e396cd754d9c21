"""ENTRY: checks this installation and this machine, and says for each problem the command that fixes it.

Compares versions with the pinned ones, runs one small operation per dependency, looks at GPU, memory and disk. Exit
status 0 if nothing failed, else 1. Every import happens inside a check, so that a missing or broken package becomes a
line of the report. Does not look at data or configuration files.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.doctor ...")

import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.missing import EXTRAS, how_to_install
from gpsd_dist.cli.names import PROGRAM, Parser
from gpsd_dist.doctor import operations

_REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
OK, WARNING, FAILED = "ok", "warning", "FAILED"
_STATUS_STYLE = {OK: "green", WARNING: "yellow", FAILED: "bold red"}

MIN_FREE_DISK_BYTES = 5 * 2**30  # untuned: prepared data and a few checkpoints of a medium run
MIN_MEMORY_BYTES = 4 * 2**30  # the quickstart's two ranks need about 2 GiB
# fbgemm's wheels are bound to the ABI of one torch minor version, and torchrec follows fbgemm.
COMPATIBLE_MINOR_VERSIONS = {"2.11": "1.6", "2.13": "1.8"}
FBGEMM_BUILDS = {"cuda": "fbgemm-gpu", "cpu": "fbgemm-gpu-cpu"}
DEPENDENCIES = (
    *("torch", "torchrec", *FBGEMM_BUILDS.values(), "numpy", "pyarrow", "ibis-framework", "duckdb", "gin-config"),
    *("pydantic", "lightgbm", "tensorboard", "fsspec", "psutil", "rich", "scipy", "jinja2", "matplotlib"),
    "safetensors",
)
OPTIONAL = {"ibis-framework": "ibis", "duckdb": "duckdb", "lightgbm": "lightgbm", "matplotlib": "matplotlib"}
"""Distributions of extras, and their modules: an installation may go without; a lock has them all."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Holds one line of the report."""

    name: str
    status: str  # OK, WARNING (works, but not as documented) or FAILED (decides the exit status)
    detail: str
    fix: str = ""  # shell command or sentence that removes the problem; empty if there is none


def _judged(name: str, is_good: bool, detail: str, fix: str, otherwise: str = WARNING) -> Check:
    return Check(name, OK, detail) if is_good else Check(name, otherwise, detail, fix)


def run_checks() -> list[Check]:
    """Runs every check; none of them raises."""
    versions = installed_versions()
    has_driver, has_cpu_build = shutil.which("nvidia-smi") is not None, "fbgemm-gpu-cpu" in versions
    flavor = "cuda" if "fbgemm-gpu" in versions or (has_driver and not has_cpu_build) else "cpu"
    reinstall = install_command(flavor)
    return [
        _check_python(),
        *check_versions(versions, pinned_versions(flavor), reinstall),
        *check_fbgemm(versions, flavor),
        *(check_operation(name, *found, reinstall) for name, found in operations.OPERATIONS.items()),
        check_torchrun(reinstall),
        *check_gpu(versions),
        *_check_machine(),
        check_writable(pathlib.Path.cwd()),
    ]


def installed_versions() -> dict[str, str]:
    """Maps those of DEPENDENCIES that are installed to their versions."""
    versions = {}
    for name in DEPENDENCIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def pinned_versions(flavor: str) -> dict[str, str]:
    """Maps distributions to versions in the lock of `flavor`, "cpu" or "cuda"; without a checkout, of the engine."""
    lock = _REPO_ROOT / ("requirements.txt" if flavor == "cuda" else "requirements-cpu.txt")
    text = (lock if lock.is_file() else engine_file(flavor)).read_text()
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;+]+)", text, re.MULTILINE))


def engine_file(flavor: str) -> pathlib.Path:
    """Returns the list of what training needs besides the package: torch, torchrec, fbgemm and what they need."""
    return pathlib.Path(__file__).with_name(f"engine-{flavor}.txt")


def engine_commands(flavor: str, versions: dict[str, str]) -> list[list[str]]:
    """Returns the commands of `--fix`. What is of the other flavor goes first.

    Both builds of fbgemm write the same files, and to pip torch 2.13.0+cpu is as good as the 2.13.0 of the CUDA list.
    """
    pip = [sys.executable, "-m", "pip"]
    others = [name for build, name in FBGEMM_BUILDS.items() if build != flavor and name in versions]
    is_other_torch = flavor == "cuda" and versions.get("torch", "").endswith("+cpu")
    uninstall = [[*pip, "uninstall", "-y", "torch", *others]] if others or is_other_torch else []
    return [*uninstall, [*pip, "install", "--no-deps", "-r", str(engine_file(flavor))]]


def install_engine(flavor: str, is_sure: bool) -> int:
    """Prints the commands that install the engine, and runs them if `is_sure`. Returns the status of the last one."""
    commands = engine_commands(flavor, installed_versions())
    print(" && \\\n".join(map(shlex.join, commands)), flush=True)
    if not is_sure:
        print("nothing was installed: add --yes, or run this yourself", file=sys.stderr)
        return 0
    return next((status for command in commands if (status := subprocess.run(command).returncode)), 0)


def install_command(flavor: str) -> str:
    """Returns the command that installs the pinned requirements into the environment of this interpreter."""
    if not (_REPO_ROOT / ".ci").is_dir():
        return f"{PROGRAM} doctor --fix {flavor} --yes"
    if sys.prefix != sys.base_prefix:
        # The set-up script does nothing in an environment that has its stamp (a copy of the lock): remove that first.
        return f"rm -f {sys.prefix}/.installed-lock && .ci/setup_venv.sh {sys.prefix} {flavor}"
    return f"make setup FLAVOR={flavor}, then use .venv/bin/python instead of {sys.executable}"


def _check_python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}; {platform.platform()}"
    fix = "install Python 3.11 or newer, then: make setup PYTHON=/path/to/python3.11"
    return _judged("python", sys.version_info >= (3, 11), detail, fix, FAILED)


def check_versions(versions: dict[str, str], pins: dict[str, str], reinstall: str) -> list[Check]:
    """Compares installed versions with the pins, without build labels (`+cpu`)."""
    checks = []
    for name in DEPENDENCIES:
        if name.startswith("fbgemm-gpu"):
            continue  # check_fbgemm compares both builds
        installed, pinned = versions.get(name), pins.get(name)
        extra = how_to_install(OPTIONAL[name]) if name in OPTIONAL and pinned is None else ""
        if installed is None and extra:
            checks.append(Check(name, WARNING, "not installed", extra))
        elif installed is None:
            checks.append(Check(name, FAILED, f"not installed (pinned: {pinned or 'no lock found'})", reinstall))
        elif pinned is not None and installed.split("+")[0] != pinned:
            checks.append(Check(name, WARNING, f"{installed}, but {pinned} is pinned", reinstall))
        else:
            checks.append(Check(name, OK, installed if pinned else f"{installed} (no lock found to compare with)"))
    return checks


def check_fbgemm(versions: dict[str, str], flavor: str) -> list[Check]:
    """Checks that exactly one build of fbgemm is installed, in the version that torch and torchrec need."""
    builds: dict[str, str] = {name: versions[name] for name in FBGEMM_BUILDS.values() if name in versions}
    if not builds:
        detail = f"neither build is installed; here: {FBGEMM_BUILDS[flavor]}"
        return [Check("fbgemm", FAILED, detail, install_command(flavor))]
    if len(builds) == 2:
        # Both write the folder fbgemm_gpu: the last one installed wins, and uninstalling one breaks the other.
        keep = "fbgemm-gpu" if shutil.which("nvidia-smi") else "fbgemm-gpu-cpu"
        fix = (
            f"{sys.executable} -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
            f" && {sys.executable} -m pip install --no-deps {keep}=={builds[keep].split('+')[0]}"
        )
        return [Check("fbgemm", FAILED, "fbgemm-gpu (CUDA) and fbgemm-gpu-cpu overwrite each other's files", fix)]
    (name, version), torch_version = next(iter(builds.items())), versions.get("torch", "")
    checks = [Check(name, OK, version)]
    minors = [_minor(versions.get(other, "")) for other in ("torch", "torchrec")] + [_minor(version)]
    expected = COMPATIBLE_MINOR_VERSIONS.get(minors[0])
    found = f"torch {minors[0]}, torchrec {minors[1]}, fbgemm {minors[2]}"
    if all(minors) and expected and (minors[1], minors[2]) != (expected, expected):
        detail = f"{found} do not belong together: torch {minors[0]} needs {expected} of both"
        checks.append(Check("torch ABI", FAILED, detail, install_command(flavor)))
    elif all(minors) and not expected:
        detail = f"{found}: untested; tested torch versions are {', '.join(COMPATIBLE_MINOR_VERSIONS)}"
        checks.append(Check("torch ABI", WARNING, detail, install_command(flavor)))
    if name == "fbgemm-gpu" and torch_version.endswith("+cpu"):
        fix = f"{sys.executable} -m pip uninstall -y fbgemm-gpu && {install_command('cpu')}"
        checks.append(Check("torch build", FAILED, f"torch {torch_version} with the CUDA build of fbgemm", fix))
    return checks


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def check_operation(name: str, distribution: str, operation: Callable[[], str], reinstall: str) -> Check:
    """Runs one operation; an exception becomes a failed check."""
    try:
        return Check(name, OK, operation())
    except ModuleNotFoundError as error:
        is_optional = error.name in EXTRAS and not (_REPO_ROOT / ".ci").is_dir()
        fix = how_to_install(error.name or "") if is_optional else reinstall
        return Check(name, WARNING if is_optional else FAILED, f"{error}", fix)
    except Exception as error:
        detail = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        # Uninstalled first, because pip keeps a package whose version is right even if its files are broken.
        fix = f"{sys.executable} -m pip uninstall -y {distribution} && {reinstall}"
        if name == "gloo":
            fix = "export GLOO_SOCKET_IFNAME=lo (one machine), or the interface that `ip route` names for other nodes"
        return Check(name, FAILED, detail, fix)


def check_torchrun(reinstall: str) -> Check:
    """Checks that torchrun is on PATH, because the launchers call it by name."""
    found, beside_python = shutil.which("torchrun"), pathlib.Path(sys.executable).with_name("torchrun")
    fix = f'export PATH="{beside_python.parent}:$PATH"' if beside_python.exists() else reinstall
    return _judged("torchrun", found is not None, found or "not on PATH", fix, FAILED)


def check_gpu(versions: dict[str, str]) -> list[Check]:
    """Checks CUDA devices, NCCL and the packed attention kernel. No GPU is fine on a machine without a driver."""
    try:
        import torch

        num_devices = torch.cuda.device_count()
    except Exception as error:
        return [Check("GPU", FAILED, f"torch cannot be imported: {type(error).__name__}", install_command("cpu"))]
    if num_devices == 0:
        if shutil.which("nvidia-smi") is None:
            return [Check("GPU", OK, "none; training runs on CPU with gloo")]
        if torch.version.cuda is None:
            fix = f"{sys.executable} -m pip uninstall -y torch fbgemm-gpu-cpu && {install_command('cuda')}"
            return [Check("GPU", WARNING, f"nvidia-smi is here, but torch {torch.__version__} is a CPU build", fix)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        detail = f"torch for CUDA {torch.version.cuda} sees no device (CUDA_VISIBLE_DEVICES: {visible})"
        return [Check("GPU", FAILED, detail, "nvidia-smi; update the driver, or start the container with --gpus all")]
    checks = []
    for index in range(num_devices):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, capability {device.major}.{device.minor}"
        checks.append(Check(f"GPU {index}", OK, detail))
    if versions.get("fbgemm-gpu") is None:
        fix = f"{sys.executable} -m pip uninstall -y fbgemm-gpu-cpu && {install_command('cuda')}"
        checks.append(Check("fbgemm build", FAILED, "a GPU is here, but fbgemm is not the CUDA build", fix))
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    checks.append(_judged("NCCL", bool(nccl), nccl or "not in this torch build", install_command("cuda"), FAILED))
    has_flash = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)
    detail = "flash kernel" if has_flash else "no flash kernel (sm80 or newer, CUDA build): bf16 runs will fail"
    checks.append(_judged("attention", has_flash, detail, "set bf16=False"))
    return [*checks, *(check_ptxas() if torch.cuda.get_device_capability()[0] == 9 else [])]


def check_ptxas() -> list[Check]:
    """Checks the assembler that Triton uses, on Hopper; empty without one.

    ptxas of CUDA 12.8 and 12.9 miscompiles some products whose operands come from registers, as HSTU's do in bf16
    (https://github.com/triton-lang/triton/pull/11781); it is said to be mended in CUDA 13.3.
    """
    spec = importlib.util.find_spec("triton")
    folder = pathlib.Path(spec.origin).parent if spec is not None else pathlib.Path("no-triton")
    path = os.environ.get("TRITON_PTXAS_PATH") or f"{folder}/backends/nvidia/bin/ptxas"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
        version = tuple(map(int, re.search(r"release (\d+)\.(\d+)", text).groups()))
    except (OSError, AttributeError, subprocess.SubprocessError):
        return []
    test = "python -m pytest -m gpu tests/numerics/test_hstu_kernel.py"
    fix = f"export TRITON_PTXAS_PATH=PTXAS_OF_CUDA_13.3; before training HSTU, in any case: {test}"
    detail = f"ptxas {version[0]}.{version[1]} at {path}"
    if version >= (13, 3):
        return [Check("ptxas", OK, detail)]
    return [Check("ptxas", WARNING, f"{detail} may miscompile HSTU's kernels in bf16 on Hopper", fix)]


def _check_machine() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free_bytes = shutil.disk_usage(pathlib.Path.cwd()).free
    detail = f"{free_bytes / 2**30:.1f} GiB free in {pathlib.Path.cwd()}"
    fix = f"free {MIN_FREE_DISK_BYTES / 2**30:.0f} GiB, or write elsewhere: --gin.OUTPUT_DIR=/large/disk/run"
    disk = _judged("disk", free_bytes >= MIN_FREE_DISK_BYTES, detail, fix)
    try:
        import psutil

        memory = psutil.virtual_memory()
        detail = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
        fix = "stop other programs, or use fewer ranks (NPROC=1 launch/local.sh ...)"
        found = _judged("memory", memory.available >= MIN_MEMORY_BYTES, detail, fix)
    except ImportError as error:
        found = Check("memory", WARNING, f"unknown: {error}", install_command("cpu"))
    return [Check("cores", OK, f"{cores} usable"), disk, found]


def check_writable(folder: pathlib.Path) -> Check:
    """Checks that the folder can be written: by default, runs and prepared data go below it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check("folder", OK, f"{folder} is writable")
    except OSError as error:
        fix = "cd to a folder of yours, or pass absolute paths: --gin.OUTPUT_DIR=/path --gin.DATA_DIR=/path"
        return Check("folder", FAILED, f"cannot write in {folder}: {error.strerror}", fix)


def print_report(checks: list[Check]) -> None:
    """Prints a table, then each problem with its fix on an unwrapped line of its own, to be copied."""
    try:
        import rich.table
        import rich.text

        from gpsd_dist.disk.console import Console
    except ImportError:
        for check in checks:
            print(f"{check.status:8} {check.name:16} {check.detail}")
    else:
        table = rich.table.Table("check", "status", "found")
        for check in checks:
            status = rich.text.Text(check.status, _STATUS_STYLE[check.status])
            table.add_row(check.name, status, rich.text.Text(check.detail))
        Console().print(table)
    for check in checks:
        if check.status != OK:
            print(f"{check.status}: {check.name}: {check.detail}\n    fix: {check.fix}")
    counts = {status: sum(check.status == status for check in checks) for status in (OK, WARNING, FAILED)}
    print(f"doctor: {counts[OK]} ok, {counts[WARNING]} warnings, {counts[FAILED]} failed")


def main(argv: list[str] | None = None) -> int:
    """Runs the checks, prints the report and returns the exit status."""
    parser = Parser(prog="python -m gpsd_dist.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object instead of a table")
    fix_help = "print the command that installs torch, torchrec and fbgemm for a CPU or for NVIDIA GPUs"
    parser.add_argument("--fix", choices=tuple(FBGEMM_BUILDS), help=fix_help)
    parser.add_argument("--yes", action="store_true", help="with --fix: run that command")
    args = parser.parse_args(argv)
    if args.yes and not args.fix:
        parser.error("--yes goes with --fix")
    if args.fix:
        return install_engine(args.fix, args.yes)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # its warning is for TorchRec's authors
    checks = run_checks()
    is_healthy = all(check.status != FAILED for check in checks)
    if args.json:
        print(json.dumps({"healthy": is_healthy, "checks": list(map(dataclasses.asdict, checks))}, indent=1))
    else:
        print_report(checks)
    return 0 if is_healthy else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
