"""HSTU's kernels, compiled for GPUs that are not there: no spills beyond a budget, and products on tensor cores.

Triton's wheel brings ptxas; neither a driver nor a GPU is needed. What this cannot see: results, and time.
"""

import itertools
import pathlib
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton: it is in requirements-dev.txt")
from gpsd_dist.model.ops import hstu_triton  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("_forward", "_backward_queries", "_backward_keys")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program, by compute capability
MAX_SPILL_BYTES = 64  # of a thread: at most 48 when this was written (sm_90, bf16, 128 channels)
MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
VARIANTS = [
    *itertools.product((90,), KERNELS, DTYPES, (64,), (True, False)),
    *itertools.product((80, 100), KERNELS, DTYPES, (64,), (True,)),
]
ALL_VARIANTS = list(itertools.product(SHARED_BYTES, KERNELS, DTYPES, (16, 32, 64, 128), (True, False)))
pytestmark = pytest.mark.timeout(300)


def signature(kernel, dtype: str, constants: dict) -> dict[str, str]:
    """Triton's type of every argument, as a launch would derive it."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("P", "NUM_TIME"):
            return "i32"
        if name.endswith("_offsets") or name in ("query_time", "key_time"):
            return "*i64"
        if name in ("bucket", "buckets"):
            return "*u8"
        return "*fp32" if "position" in name or name in ("time_weight", "grad_time") else f"*{dtype}"

    return {name: kind(name) for name in kernel.arg_names}


def compiled(monkeypatch, arch: int, name: str, dtype: str, width: int, is_causal: bool) -> dict:
    """Registers, spills and shared memory of the machine code, and its matrix instructions."""
    monkeypatch.setattr(hstu_triton, "_generation", lambda query: arch // 10)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, query = getattr(hstu_triton, name), torch.empty(1, 4, width, dtype=DTYPES[dtype])
    segments = hstu_triton.Segments(None, None, None, None, 1, 1, is_causal)
    constants = hstu_triton._options(query, [1, 1], segments) | {"COPIES": hstu_triton._GRADIENT_COPIES}
    options = {"num_warps": constants.pop("num_warps")}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    kinds = signature(kernel, dtype, constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if kinds[n].startswith("*")}
    source = ASTSource(kernel, kinds, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    used = {kind for kind in MATRIX_INSTRUCTIONS if kind in ptx}
    return machine_code(ptx, arch) | {"shared_bytes": built.metadata.shared, "matrix": used}


def machine_code(ptx: str, arch: int) -> dict[str, int]:
    """Asks ptxas, which compiles a second time, because only then it says what it used."""
    folder = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if arch >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas")
    target = re.search(r"\.target (\w+)", ptx).group(1)
    command = [tool, "-v", f"--gpu-name={target}", "-", "-o", "/dev/null"]
    text = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    spilt = re.search(r"(\d+) bytes spill stores", text).group(1)
    return {"registers": int(re.search(r"Used (\d+) registers", text).group(1)), "spilt_bytes": int(spilt)}


def problems(arch: int, dtype: str, found: dict) -> list[str]:
    """What is beyond the budget."""
    rules = {
        f"spills {found['spilt_bytes']} bytes a thread": found["spilt_bytes"] > MAX_SPILL_BYTES,
        f"needs {found['shared_bytes']} bytes of shared memory": found["shared_bytes"] > SHARED_BYTES[arch],
        f"{dtype} without tensor cores": not found["matrix"],
    }
    return [problem for problem, is_so in rules.items() if is_so]


@pytest.fixture(autouse=True)
def compiles():
    """In Triton's interpreter there is nothing to compile."""
    if type(triton.language.zeros).__name__ == "InterpretedFunction":
        pytest.skip("Triton was imported for its interpreter")


@pytest.mark.parametrize(("arch", "name", "dtype", "width", "is_causal"), VARIANTS)
def test_a_kernel_stays_within_its_budget(monkeypatch, arch, name, dtype, width, is_causal):
    found = compiled(monkeypatch, arch, name, dtype, width, is_causal)
    assert not problems(arch, dtype, found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "name", "dtype", "width", "is_causal"), [v for v in ALL_VARIANTS if v not in set(VARIANTS)]
)
def test_every_variant_stays_within_its_budget(monkeypatch, arch, name, dtype, width, is_causal):
    found = compiled(monkeypatch, arch, name, dtype, width, is_causal)
    assert not problems(arch, dtype, found), found


def test_a_tile_that_is_too_large_is_found(monkeypatch):
    monkeypatch.setattr(hstu_triton, "_tile_bytes", lambda *_: 16384)
    found = compiled(monkeypatch, 90, "_backward_keys", "fp32", 128, True)
    assert [text for text in problems(90, "fp32", found) if text.startswith("spills ")], found
