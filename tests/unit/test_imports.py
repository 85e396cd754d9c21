"""Who may import whom: the layers of `gpsd_dist`, and which file may touch which library."""

import ast
import pathlib
import subprocess
import sys

import pytest

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]

# A module imports its own layer or a lower one. What is not named here is in the middle.
BASE, MIDDLE, COMPOSITION, ENTRY = range(4)
LAYERS = {
    "config": BASE,
    "execution_config": BASE,
    "id_options": BASE,
    "model_options": BASE,
    "option_checks": BASE,
    "exit_codes": BASE,
    "schema": BASE,
    "packing": BASE,
    "packing_padded": BASE,
    "table_options": BASE,
    "packing_rows": BASE,
    "gin_cli": COMPOSITION,
    "trainer": COMPOSITION,
    "training_step": COMPOSITION,
    "scaling_law": COMPOSITION,
    "train": ENTRY,
    "launcher": ENTRY,
    "evaluate": ENTRY,
    "export": ENTRY,
    "predict": ENTRY,
    "plan": ENTRY,
    "quickstart": ENTRY,
    "doctor": ENTRY,
    "scaling": ENTRY,
    "report": ENTRY,
}
# Third-party packages of single files; None: not restricted by name.
ALLOWED_LIBRARIES = {
    "gpsd_dist": set(),
    "gpsd_dist.config": set(),
    "gpsd_dist.execution_config": set(),
    "gpsd_dist.model_options": set(),
    "gpsd_dist.option_checks": set(),
    "gpsd_dist.id_options": set(),
    "gpsd_dist.exit_codes": set(),
    "gpsd_dist.distributed.watchdog": set(),
    "gpsd_dist.schema": {"pyarrow"},
    "gpsd_dist.packing": {"torch", "numpy"},
    "gpsd_dist.packing_padded": {"torch", "numpy"},
    "gpsd_dist.table_options": set(),
    "gpsd_dist.packing_rows": {"torch", "numpy"},
    "gpsd_dist.losses": {"torch"},
    "gpsd_dist.model.transformer": {"torch"},
    "gpsd_dist.optim.schedule": {"torch"},
}
GIN_USERS = ("gpsd_dist.gin_cli", "gpsd_dist.doctor_operations")
TORCHREC_USERS = (
    "gpsd_dist.distributed.",
    "gpsd_dist.model.embeddings",
    "gpsd_dist.data.batch",
    "gpsd_dist.data.collate",
    "gpsd_dist.data.distinct",
    "gpsd_dist.ids.",
    "gpsd_dist.optim.",
    "gpsd_dist.checkpoint.",
    "gpsd_dist.doctor_operations",
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


def layer(module: str) -> int:
    parts = module.split(".")
    return LAYERS.get(parts[1], MIDDLE) if len(parts) > 1 else BASE


def violations(module: str, source: str) -> list[str]:
    """The rules that `module` with this source breaks, one sentence each."""
    found = []
    for name in imported_names(source):
        top = name.split(".")[0]
        if module.startswith("data_pipeline"):
            if top in ("torch", "torchrec", "fbgemm_gpu", "gin"):
                found.append(f"{module} imports {name}; the pipeline runs without torch and gin")
            if top == "gpsd_dist" and not f"{name}.".startswith("gpsd_dist.schema.") and name != "gpsd_dist":
                found.append(f"{module} imports {name}; of gpsd_dist it may use schema only")
            continue
        if top == "data_pipeline" and module != "gpsd_dist.quickstart":
            found.append(f"{module} imports {name}; data reach training through Parquet files only")
        if top == "gpsd_dist" and layer(name) > layer(module):
            found.append(f"{module} imports {name}, which is in a higher layer")
        if module.startswith("gpsd_dist.model.") and name.startswith("gpsd_dist.distributed"):
            found.append(f"{module} imports {name}; the model is single-device code")
        if name == "gpsd_dist.trainer" and layer(module) != ENTRY:
            found.append(f"{module} imports {name}; only entries do")
        if top == "gin" and module not in GIN_USERS:
            found.append(f"{module} imports gin; only gin_cli does")
        if top in ("torchrec", "fbgemm_gpu") and not module.startswith(TORCHREC_USERS):
            found.append(f"{module} imports {name}; TorchRec stays in {', '.join(TORCHREC_USERS)}")
        is_library = top not in sys.stdlib_module_names and top != "gpsd_dist"
        if is_library and module in ALLOWED_LIBRARIES and top not in ALLOWED_LIBRARIES[module]:
            found.append(f"{module} imports {name}; allowed: {sorted(ALLOWED_LIBRARIES[module]) or 'nothing'}")
    return found


def modules() -> list[tuple[str, pathlib.Path]]:
    paths = [path for package in ("gpsd_dist", "data_pipeline") for path in (REPO_ROOT / package).rglob("*.py")]
    dotted = [".".join(path.relative_to(REPO_ROOT).with_suffix("").parts) for path in paths]
    return sorted((name.removesuffix(".__init__"), path) for name, path in zip(dotted, paths, strict=True))


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_module_imports_only_what_its_layer_may(module, path):
    assert not violations(module, path.read_text())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gpsd_dist.config", "import torch"),
        ("gpsd_dist.schema", "def f():\n    import numpy"),
        ("gpsd_dist.losses", "import torchrec"),
        ("gpsd_dist.model.gpsd", "from gpsd_dist.distributed import runtime"),
        ("gpsd_dist.model.gpsd", "from gpsd_dist import trainer"),
        ("gpsd_dist.data.loader", "import gin"),
        ("gpsd_dist.schema", "from gpsd_dist.data import batch"),
        ("gpsd_dist.gin_cli", "from gpsd_dist import trainer"),
        ("gpsd_dist.trainer", "from gpsd_dist.train import main"),
        ("gpsd_dist.trainer", "from data_pipeline import build"),
        ("data_pipeline.build", "from gpsd_dist import config"),
        ("data_pipeline.sources.taobao", "from gpsd_dist.data.batch import Batch"),
        ("data_pipeline.build", "import torch.nn"),
    ],
)
def test_forbidden_import_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gpsd_dist.train", "from gpsd_dist import gin_cli, trainer"),
        ("gpsd_dist.trainer", "from gpsd_dist.data.batch import Batch"),
        ("gpsd_dist.losses", "import math\nimport torch.nn.functional as F"),
        ("data_pipeline.write", "from gpsd_dist import schema\nfrom gpsd_dist.schema import Manifest\nimport ibis"),
    ],
)
def test_ordinary_import_is_allowed(module, source):
    assert not violations(module, source)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gpsd_dist", {"torch", "gin", "pyarrow"}),
        ("gpsd_dist.config", {"torch", "gin"}),
        ("gpsd_dist.schema", {"torch", "gin", "ibis"}),
        ("gpsd_dist.report", {"torch", "gin", "ibis"}),
        ("data_pipeline.build", {"torch", "gin"}),
    ],
)
def test_import_pulls_in_no_heavy_library(module, absent):
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
