"""`python -m gpsd_dist.doctor`: is this installation sound, and what is on this machine?

Versions against the pinned ones, one small operation per dependency, GPU, memory, disk - and for each problem the
command that fixes it. Exit status 0 if nothing failed, 1 otherwise. Every import happens inside a check, so that a
missing or broken package becomes a line of the report. Not responsible for data or configuration files.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata

_REPO_ROOT = pathlib.Path(__file__).resolve().parents[1]
OK, WARNING, FAILED = "ok", "warning", "FAILED"
_STATUS_STYLE = {OK: "green", WARNING: "yellow", FAILED: "bold red"}

MIN_FREE_DISK_BYTES = 5 * 2**30  # untuned: prepared data and a few checkpoints of a medium run
MIN_MEMORY_BYTES = 4 * 2**30  # the quickstart's two ranks need about 2 GiB
# fbgemm's wheels are bound to the ABI of one torch minor version, and torchrec follows fbgemm.
COMPATIBLE_MINOR_VERSIONS = {"2.11": "1.6", "2.13": "1.8"}
DEPENDENCIES = (
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "numpy",
    "pyarrow",
    "ibis-framework",
    "duckdb",
    "gin-config",
    "tensorboard",
    "safetensors",
    "fsspec",
    "psutil",
    "rich",
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str
    """OK, WARNING (works, but not as documented) or FAILED (decides the exit status)."""
    detail: str
    fix: str = ""
    """Shell command or sentence that removes the problem; empty if there is none."""


def run_checks() -> list[Check]:
    """Runs every check; none of them raises."""
    versions = installed_versions()
    flavor = "cuda" if "fbgemm-gpu" in versions or (shutil.which("nvidia-smi") and "fbgemm-gpu-cpu" not in versions) else "cpu"
    reinstall = install_command(flavor)
    checks = [_check_python(), *check_versions(versions, pinned_versions(flavor), reinstall), *check_fbgemm(versions, flavor)]
    for name, operation in OPERATIONS.items():
        checks.append(check_operation(name, operation, reinstall))
    return [*checks, check_torchrun(reinstall), *check_gpu(versions), *_check_machine(), check_writable(pathlib.Path.cwd())]


# ---- versions -------------------------------------------------------------------------------------------------------


def installed_versions() -> dict[str, str]:
    """Distribution name -> version, for those of DEPENDENCIES that are installed."""
    versions = {}
    for name in DEPENDENCIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def pinned_versions(flavor: str) -> dict[str, str]:
    """Distribution name -> version in the lock of `flavor` ("cpu" or "cuda"); empty outside a checkout or image."""
    lock = _REPO_ROOT / ("requirements.txt" if flavor == "cuda" else "requirements-cpu.txt")
    if not lock.is_file():
        return {}
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE))


def install_command(flavor: str) -> str:
    """The command that puts the pinned requirements into the environment of this interpreter."""
    if sys.prefix != sys.base_prefix:
        return f".ci/setup_venv.sh {sys.prefix} {flavor}"
    return f"make setup FLAVOR={flavor}, then use .venv/bin/python instead of {sys.executable}"


def _check_python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}; {platform.platform()}"
    if sys.version_info < (3, 11):
        return Check("python", FAILED, detail, "install Python 3.11 or newer, then: make setup PYTHON=/path/to/python3.11")
    return Check("python", OK, detail)


def check_versions(versions: dict[str, str], pins: dict[str, str], reinstall: str) -> list[Check]:
    """Compares what is installed with the pins. A build label (`+cpu`) is not part of the comparison."""
    checks = []
    for name in DEPENDENCIES:
        if name.startswith("fbgemm-gpu"):
            continue  # check_fbgemm looks at both builds together
        installed, pinned = versions.get(name), pins.get(name)
        if installed is None:
            checks.append(Check(name, FAILED, f"not installed (pinned: {pinned or 'no lock found'})", _restart(reinstall)))
        elif pinned is not None and installed.split("+")[0] != pinned:
            checks.append(Check(name, WARNING, f"{installed}, but {pinned} is pinned", _restart(reinstall)))
        else:
            checks.append(Check(name, OK, installed if pinned else f"{installed} (no lock found to compare with)"))
    return checks


def check_fbgemm(versions: dict[str, str], flavor: str) -> list[Check]:
    """Exactly one build of fbgemm, of the version that torch and torchrec were made for."""
    builds = {name: versions[name] for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if name in versions}
    if not builds:
        package = "fbgemm-gpu" if flavor == "cuda" else "fbgemm-gpu-cpu"
        return [Check("fbgemm", FAILED, f"neither build is installed; here: {package}", _restart(install_command(flavor)))]
    if len(builds) == 2:
        # Both write the folder fbgemm_gpu; whichever came last wins, and uninstalling one breaks the other.
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
        checks.append(Check("torch ABI", FAILED, detail, _restart(install_command(flavor))))
    elif all(minors) and not expected:
        detail = f"{found}: untested; tested torch versions are {', '.join(COMPATIBLE_MINOR_VERSIONS)}"
        checks.append(Check("torch ABI", WARNING, detail, _restart(install_command(flavor))))
    if name == "fbgemm-gpu" and torch_version.endswith("+cpu"):
        checks.append(Check("torch build", FAILED, f"torch {torch_version} with the CUDA build of fbgemm", _swap_fbgemm(version)))
    return checks


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _swap_fbgemm(version: str) -> str:
    python = sys.executable
    return (
        f"{python} -m pip uninstall -y fbgemm-gpu"
        f" && {python} -m pip install --no-deps --force-reinstall fbgemm-gpu-cpu=={version.split('+')[0]}"
    )


def _restart(reinstall: str) -> str:
    """`reinstall`, made effective: the set-up script does nothing while its stamp equals the lock."""
    if not reinstall.startswith(".ci/"):
        return reinstall
    return f"rm -f {sys.prefix}/.installed-lock && {reinstall}"


# ---- one operation per dependency -----------------------------------------------------------------------------------


def check_operation(name: str, operation: Callable[[], str], reinstall: str) -> Check:
    """Runs one operation; whatever goes wrong in it is a line of the report, not a crash."""
    try:
        return Check(name, OK, operation())
    except ModuleNotFoundError as error:
        return Check(name, FAILED, f"{error}", _restart(reinstall))
    except Exception as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return Check(name, FAILED, f"{type(error).__name__}: {first_line}", _reinstall_one(name, reinstall))


def _reinstall_one(operation_name: str, reinstall: str) -> str:
    package = operation_name.split(":")[0]
    if package not in pinned_versions("cpu"):
        return _restart(reinstall)
    return f"{sys.executable} -m pip uninstall -y {package} && {_restart(reinstall)}"


def _torch_attention() -> str:
    import torch

    query = torch.linspace(-1, 1, 2 * 4 * 8).reshape(1, 2, 4, 8).requires_grad_()
    hidden = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    (hidden @ hidden.transpose(-1, -2)).sum().backward()
    assert query.grad is not None and bool(query.grad.isfinite().all()), "gradient is not finite"
    return f"matmul and causal attention with gradient, {torch.get_num_threads()} threads"


def _fbgemm_jagged() -> str:
    import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
    import torch

    dense = torch.ops.fbgemm.jagged_to_padded_dense(torch.arange(3.0)[:, None], [torch.tensor([0, 1, 3])], [2], 0.0)
    assert dense[..., 0].tolist() == [[0.0, 0.0], [1.0, 2.0]], f"wrong result {dense.tolist()}"
    return "jagged_to_padded_dense"


def _torchrec_lookup() -> str:
    import torch
    import torchrec

    config = torchrec.EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=3, feature_names=["f"])
    tables = torchrec.EmbeddingCollection(tables=[config])
    ids = torchrec.KeyedJaggedTensor(keys=["f"], values=torch.tensor([2]), lengths=torch.tensor([1]))
    row = tables(ids)["f"].values()
    assert torch.equal(row[0], tables.embeddings["t"].weight[2]), "looked up the wrong row"
    return "EmbeddingCollection looked up one row"


def _pyarrow_parquet() -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, buffer = pa.table({"x": [[1, 2], []]}), io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    assert pq.read_table(buffer).equals(table), "Parquet round trip changed the table"
    return "Parquet round trip, zstd"


def _ibis_duckdb() -> str:
    import ibis

    table = ibis.memtable({"user": [1, 1, 2], "time_s": [5, 7, 6]})
    last = table.group_by("user").agg(last_s=table.time_s.max()).order_by("user")
    found = ibis.duckdb.connect().to_pyarrow(last).to_pylist()
    assert found == [{"user": 1, "last_s": 7}, {"user": 2, "last_s": 6}], f"wrong result {found}"
    return "grouped query on DuckDB"


def _gin_parse() -> str:
    importlib.util.find_spec("gin")  # gin 0.5.0 uses importlib.util without importing it
    from gin import config_parser

    class _Delegate(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name, evaluate):
            raise NotImplementedError

        def macro(self, macro_name):
            raise NotImplementedError

    # The parser alone: binding a value would leave global state behind.
    (statement,) = list(config_parser.ConfigParser("Model.width = 64", _Delegate()))
    assert (statement.selector, statement.arg_name, statement.value) == ("Model", "width", 64), f"parsed {statement}"
    return "parsed one binding"


def _tensorboard_writer() -> str:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("doctor", 1.0, 0)
        assert any(path.stat().st_size for path in pathlib.Path(folder).iterdir()), "no event file was written"
    return "wrote one scalar"


def _gloo_group() -> str:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return "skipped: a process group exists already"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            value = torch.ones(1)
            dist.all_reduce(value)
        finally:
            dist.destroy_process_group()
    assert value.item() == 1.0, f"all_reduce over one rank gave {value.item()}"
    return "process group of one rank, all_reduce"


OPERATIONS: dict[str, Callable[[], str]] = {
    "torch: attention": _torch_attention,
    "fbgemm: jagged": _fbgemm_jagged,
    "torchrec: lookup": _torchrec_lookup,
    "pyarrow: Parquet": _pyarrow_parquet,
    "duckdb: query": _ibis_duckdb,
    "gin-config: parse": _gin_parse,
    "tensorboard: writer": _tensorboard_writer,
    "torch: gloo": _gloo_group,
}
