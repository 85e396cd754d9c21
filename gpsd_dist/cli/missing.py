"""Says in one sentence which package a command lacks, and the command that installs it."""

import importlib.util
import sys

from gpsd_dist.cli.names import PROGRAM

ENGINE = ("torch", "torchrec", "fbgemm_gpu", "tensordict", "torchmetrics", "pyre_extensions")
EXTRAS = {  # module -> extra of the package that brings it
    **dict.fromkeys(("ibis", "duckdb"), "data"),
    **dict.fromkeys(("jinja2", "matplotlib"), "report"),
    "lightgbm": "baselines",
    **dict.fromkeys(("starlette", "uvicorn", "httptools", "msgspec", "prometheus_client"), "serve"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    "s3fs": "s3",
    "mlflow": "mlflow",
    "pyspark": "spark",
}


def how_to_install(module: str, command: str = "") -> str:
    """Gives the line that installs a module that the core of the package goes without; empty for others.

    `command`: name of the command that needs it. A server needs torch, but nothing else of the engine.
    """
    top = module.partition(".")[0]
    if top == "torch" and command == "serve":
        return f"pip install '{PROGRAM}[serve]'"
    if top in ENGINE:
        return f"{PROGRAM} doctor --fix cpu --yes (with NVIDIA GPUs: --fix cuda)"
    return f"pip install '{PROGRAM}[{EXTRAS[top]}]'" if top in EXTRAS else ""


def say_missing(error: ModuleNotFoundError, command: str = "") -> int:
    """Prints what to install, and returns status 2. Raises `error` again if it is about anything else."""
    fix = how_to_install(error.name or "", command)
    if not fix:
        raise error
    sys.stderr.write(f"error: {(error.name or '').partition('.')[0]} is not installed, which this needs: {fix}\n")
    return 2


def require(*modules: str) -> None:
    """Ends the process with the sentence of `say_missing` unless all modules are installed.

    It is for `python -m` of a file that imports them at its top, where `cli.main.run_main` is not reached.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.exit(say_missing(ModuleNotFoundError(name=module)))
