"""Exports the two parts of a Transformer to ONNX, for `--engine onnx`."""

import importlib.util
import pathlib

import torch

from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.model.transformer import Transformer
from gpsd_dist.serving.transformer_form import Encode, Score
from gpsd_dist.serving.two_part import ENCODE_INPUTS, ENCODE_NAME, SCORE_INPUTS, SCORE_NAME

_OPSET = 20
_FREE = torch.export.Dim.DYNAMIC


def write_onnx(model: RankingModel, tasks: tuple[str, ...], folder: pathlib.Path) -> None:
    """Writes `encode.onnx` and `score.onnx`; takes half a minute. ValueError for another tower, or without onnx."""
    tower = model.backbone.tower
    if not isinstance(tower, Transformer):
        raise ValueError(f"--engine onnx serves the Transformer, this is {type(tower).__name__}: leave the option out")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--engine onnx needs {', '.join(missing)}: pip install 'gpsd-dist[onnx]'")
    layers, heads, width, context = len(tower.blocks), tower.rotary.heads, tower.out_width, model.context.width
    # Free sizes that differ, none of them 0 or 1: the exporter takes equal ones for one, and 0 and 1 for constants.
    # Keys and values are tensors of their own for the same reason.
    old, whole = (
        tuple(torch.zeros(layers, 2, heads, size, width // heads) for _ in ("keys", "values")) for size in (3, 5)
    )
    cached = ({1: _FREE, 3: _FREE},) * 2
    encode = (torch.zeros(2, 6, width), *old)
    score = (torch.zeros(2, 7, width), torch.zeros(2, 7, context), torch.tensor([5, 4]), *whole)
    _write(Encode(tower), encode, ({0: _FREE, 1: _FREE}, *cached), ENCODE_INPUTS, folder / ENCODE_NAME)
    free = ({0: _FREE, 1: _FREE}, {0: _FREE, 1: _FREE}, {0: _FREE}, *cached)
    _write(Score(model, tasks), score, free, SCORE_INPUTS, folder / SCORE_NAME)


def _write(part: torch.nn.Module, example: tuple, free: tuple, names: tuple[str, ...], path: pathlib.Path) -> None:
    program = torch.onnx.export(
        part.eval(),
        example,
        dynamo=True,
        dynamic_shapes=free,
        opset_version=_OPSET,
        input_names=list(names),
        verbose=False,
    )
    assert program is not None
    program.save(path, include_initializers=True)
