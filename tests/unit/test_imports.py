"""Who may import whom: the layers of `gpsd_dist`, and which file may touch which library."""

import ast
import pathlib
import subprocess
import sys

import pytest

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]

# One ordered list of the rooms of `gpsd_dist`, a folder or a file of its root each: a room imports rooms below it only.
# So no ring of rooms can exist; that no ring of files hides inside a room is tested apart.
ROOMS = (
    # commands
    *(
        "__main__",
        "api",
        "train",
        "quickstart",
        "fit",
        "predict",
        "index",
        "serve",
        "export",
        "counters",
        "evaluate",
        "trained_run",
        "launcher",
        "run_description",
        "run_outcome",
        "plan",
        "scaling",
        "commands",
        "report",
        "doctor",
    ),
    # one run
    *("trainer", "training_step", "assembly", "preflight", "stages", "baselines"),
    "serving",
    # parts of a run
    *("checkpoint", "tables", "metrics", "data", "distributed", "model", "optim"),
    # the ground
    *("config", "batch", "features", "schema", "parameter_names", "validation", "disk", "cli"),
)
MAX_ROOT_FILES = 20
# Third-party packages of single files; None: not restricted by name.
ALLOWED_LIBRARIES = {
    "gpsd_dist": set(),
    "gpsd_dist.cli.main": set(),
    "gpsd_dist.cli.missing": set(),
    "gpsd_dist.cli.names": set(),
    "gpsd_dist.config": {"pydantic"},
    "gpsd_dist.config.execution": {"pydantic"},
    "gpsd_dist.config.ids": {"pydantic"},
    "gpsd_dist.config.model": {"pydantic"},
    "gpsd_dist.config.run": {"pydantic"},
    "gpsd_dist.config.tables": {"pydantic"},
    "gpsd_dist.config.training": {"pydantic"},
    "gpsd_dist.validation": {"pydantic"},
    "gpsd_dist.disk.reading": set(),
    "gpsd_dist.disk.text": set(),
    "gpsd_dist.disk.writing": set(),
    "gpsd_dist.distributed.exit_codes": set(),
    "gpsd_dist.distributed.watchdog": set(),
    "gpsd_dist.features": {"numpy", "pyarrow"},
    "gpsd_dist.schema": {"pyarrow"},
    "gpsd_dist.data.data_versions": set(),
    "gpsd_dist.parameter_names": {"torch"},  # within the one function that needs it
    "gpsd_dist.batch.packing": {"torch", "numpy"},
    "gpsd_dist.batch.padding": {"torch", "numpy"},
    "gpsd_dist.batch.row_layout": {"torch", "numpy"},
    "gpsd_dist.stages.losses": {"torch"},
    "gpsd_dist.model.transformer": {"torch"},
    "gpsd_dist.optim": {"torch"},
}
FOLDERS = ("gpsd_dist", "gpsd_dist.cli", "gpsd_dist.data", "gpsd_dist.disk")  # that those files are in
FOR_THE_PIPELINE = (
    "gpsd_dist.schema.",
    "gpsd_dist.data.data_versions.",
    "gpsd_dist.features.",
    "gpsd_dist.disk.",
    "gpsd_dist.cli.",
)
GIN_USERS = ("gpsd_dist.config.gin_cli", "gpsd_dist.doctor.operations")
HTTP_LIBRARIES = ("starlette", "uvicorn", "msgspec", "prometheus_client")
HTTP_USERS = tuple(f"gpsd_dist.serving.{name}" for name in ("app", "messages", "metrics", "service"))
TORCHREC_USERS = (
    "gpsd_dist.tables.",
    "gpsd_dist.distributed.",
    "gpsd_dist.batch.batch",
    "gpsd_dist.batch.lookup",
    "gpsd_dist.data.collate",
    "gpsd_dist.data.distinct",
    "gpsd_dist.checkpoint.",
    "gpsd_dist.doctor.operations",
)


def imported_names(source: str) -> list[str]:
    """Every dotted name that the source imports, also inside functions; `from a import b` counts as a and a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def room(module: str) -> str:
    """The folder or file of the package's root that the module belongs to; empty for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def looks_up(importer: str, imported: str) -> bool:
    """Whether an import leads from one room to another that is not below it."""
    here, there = room(importer), room(imported)
    return bool(here and there) and here != there and ROOMS.index(there) <= ROOMS.index(here)


def violations(module: str, source: str) -> list[str]:
    """The rules that `module` with this source breaks, one sentence each."""
    found = []
    for name in imported_names(source):
        top = name.split(".")[0]
        if module.startswith("data_pipeline"):
            if top in ("torch", "torchrec", "fbgemm_gpu", "gin"):
                found.append(f"{module} imports {name}; the pipeline runs without torch and gin")
            if top == "gpsd_dist" and not f"{name}.".startswith(FOR_THE_PIPELINE) and name not in FOLDERS:
                found.append(f"{module} imports {name}; of gpsd_dist it may use {', '.join(FOR_THE_PIPELINE)} only")
            continue
        if top == "data_pipeline":
            found.append(f"{module} imports {name}; data reach training through Parquet files only")
        if top == "gpsd_dist" and looks_up(module, name):
            found.append(f"{module} imports {name}, which is not below it in ROOMS")
        if top == "gin" and module not in GIN_USERS:
            found.append(f"{module} imports gin; only gin_cli does")
        if top in ("torchrec", "fbgemm_gpu") and not module.startswith(TORCHREC_USERS):
            found.append(f"{module} imports {name}; TorchRec stays in {', '.join(TORCHREC_USERS)}")
        if top in HTTP_LIBRARIES and module not in HTTP_USERS:
            found.append(f"{module} imports {name}; HTTP stays in {', '.join(HTTP_USERS)}")
        is_library = top not in sys.stdlib_module_names and top != "gpsd_dist"
        if is_library and module in ALLOWED_LIBRARIES and top not in ALLOWED_LIBRARIES[module]:
            found.append(f"{module} imports {name}; allowed: {sorted(ALLOWED_LIBRARIES[module]) or 'nothing'}")
    return found


def rings(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another in a ring: what is left when those outside of every ring are taken away."""
    left = {module: targets & set(imports) - {module} for module, targets in imports.items()}
    while free := [m for m, targets in left.items() if not targets or not any(m in t for t in left.values())]:
        for module in free:
            del left[module]
        left = {module: targets & set(left) for module, targets in left.items()}
    return [sorted(left)] if left else []


def modules() -> list[tuple[str, pathlib.Path]]:
    paths = [path for package in ("gpsd_dist", "data_pipeline") for path in (REPO_ROOT / package).rglob("*.py")]
    dotted = [".".join(path.relative_to(REPO_ROOT).with_suffix("").parts) for path in paths]
    return sorted((name.removesuffix(".__init__"), path) for name, path in zip(dotted, paths, strict=True))


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_module_imports_only_what_its_layer_may(module, path):
    assert not violations(module, path.read_text())


def test_every_room_is_listed_once_and_the_root_stays_small():
    rooms = {room(name) for name, _ in modules() if name.startswith("gpsd_dist.")}
    assert rooms == set(ROOMS) and len(ROOMS) == len(set(ROOMS))
    assert len(list((REPO_ROOT / "gpsd_dist").glob("*.py"))) <= MAX_ROOT_FILES


def test_no_ring_of_files():
    sources = {name: path.read_text() for name, path in modules() if name.startswith("gpsd_dist")}
    assert not rings({name: set(imported_names(source)) for name, source in sources.items()})


def test_a_ring_of_files_is_found():
    ring = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert rings(ring) == [["a", "b", "c"]]
    assert not rings({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gpsd_dist.config", "import torch"),
        ("gpsd_dist.schema", "def f():\n    import numpy"),
        ("gpsd_dist.stages.losses", "import torchrec"),
        ("gpsd_dist.model.gpsd", "from gpsd_dist.distributed import runtime"),
        ("gpsd_dist.model.gpsd", "from gpsd_dist import trainer"),
        ("gpsd_dist.data.loader", "import gin"),
        ("gpsd_dist.schema", "from gpsd_dist.data import batch"),
        ("gpsd_dist.config.gin_cli", "from gpsd_dist import trainer"),
        ("gpsd_dist.data.loader", "from gpsd_dist.tables import sharding"),
        ("gpsd_dist.tables.sharding", "from gpsd_dist.checkpoint import manager"),
        ("gpsd_dist.trainer", "from gpsd_dist.train import main"),
        ("gpsd_dist.trainer", "from data_pipeline import build"),
        ("gpsd_dist.serving.scorer", "import msgspec"),
        ("gpsd_dist.serving.app", "from gpsd_dist.serve import main"),
        ("data_pipeline.build", "from gpsd_dist import config"),
        ("data_pipeline.sources.taobao", "from gpsd_dist.batch.batch import Batch"),
        ("data_pipeline.build", "import torch.nn"),
    ],
)
def test_forbidden_import_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gpsd_dist.train", "from gpsd_dist import trainer\nfrom gpsd_dist.config import gin_cli"),
        ("gpsd_dist.trainer", "from gpsd_dist.batch.batch import Batch"),
        ("gpsd_dist.stages.losses", "import math\nimport torch.nn.functional as F"),
        ("data_pipeline.write", "from gpsd_dist import schema\nfrom gpsd_dist.schema import Manifest\nimport ibis"),
    ],
)
def test_ordinary_import_is_allowed(module, source):
    assert not violations(module, source)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gpsd_dist", {"torch", "gin", "pyarrow"}),
        ("gpsd_dist.api", {"torch", "scipy", "matplotlib"}),
        ("gpsd_dist.config", {"torch", "gin"}),
        ("gpsd_dist.features", {"torch", "gin", "ibis", "pydantic"}),
        ("gpsd_dist.schema", {"torch", "gin", "ibis", "pydantic"}),
        ("gpsd_dist.parameter_names", {"torch"}),
        ("gpsd_dist.serving.retriever", {"torchrec", "gin", "ibis"}),
        ("gpsd_dist.report.__main__", {"torch", "gin", "ibis"}),
        ("data_pipeline.build", {"torch", "gin"}),
    ],
)
def test_import_pulls_in_no_heavy_library(module, absent):
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
