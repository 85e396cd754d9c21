"""Names what both ways of predicting write. Needs neither torch nor TorchRec."""

import pathlib

import pyarrow as pa

SUMMARY_NAME = "predictions.json"


def number_fields(task: str, is_conditional: bool) -> list[pa.Field]:
    """Lists the columns of a task: logit, probability, and the product of a conditional one."""
    numbers = ("logit", "probability", "product") if is_conditional else ("logit", "probability")
    return [pa.field(f"{task}.{number}", pa.float32()) for number in numbers]


def claim(out_dir: pathlib.Path) -> None:
    """Makes the folder of an output. ValueError if it has something in it."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"--out {out_dir} exists and is not an empty folder; name another one, or delete it")
    out_dir.mkdir(parents=True, exist_ok=True)
