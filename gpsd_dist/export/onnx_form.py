"""Exports the two parts of a tower to ONNX, for `--engine onnx`."""

import collections.abc
import contextlib
import importlib.util
import logging
import pathlib
import warnings

import torch

from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.serving.two_part import ENCODE_INPUTS, ENCODE_NAME, SCORE_INPUTS, SCORE_NAME, TIME_INPUTS
from gpsd_dist.serving.two_part_form import Encode, Score, is_timed, layers_of

_OPSET = 20
_FREE = torch.export.Dim.DYNAMIC


def write_onnx(model: RankingModel, tasks: tuple[str, ...], folder: pathlib.Path) -> None:
    """Writes `encode.onnx` and `score.onnx`; takes half a minute. ValueError for another tower, or without onnx."""
    tower = model.backbone.tower
    try:
        layers = layers_of(tower)
    except ValueError as error:
        raise ValueError(f"--engine onnx: {error}; leave the option out") from error
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--engine onnx needs {', '.join(missing)}: pip install 'gpsd-dist[onnx]'")
    width, context = tower.out_width, model.context.width
    # Free sizes that differ, none of them 0 or 1: the exporter takes equal ones for one, and 0 and 1 for constants.
    # Keys and values are tensors of their own for the same reason.
    old, whole = (
        tuple(torch.zeros(len(layers), 2, layers[0].heads, size, layers[0].head_width) for _ in ("keys", "values"))
        for size in (3, 5)
    )
    cached = ({1: _FREE, 3: _FREE},) * 2
    encode: tuple = (torch.zeros(2, 6, width), *old)
    score: tuple = (torch.zeros(2, 7, width), torch.zeros(2, 7, context), torch.tensor([5, 4]), *whole)
    of_encode: tuple = ({0: _FREE, 1: _FREE}, *cached)
    of_score: tuple = ({0: _FREE, 1: _FREE}, {0: _FREE, 1: _FREE}, {0: _FREE}, *cached)
    times = TIME_INPUTS if is_timed(tower) else ()
    if times:
        encode, of_encode = (
            (*encode, torch.ones(2, 6, 9, dtype=torch.int64)),
            (*of_encode, {0: _FREE, 1: _FREE, 2: _FREE}),
        )
        score, of_score = (*score, torch.ones(2, 6, dtype=torch.int64)), (*of_score, {0: _FREE, 1: _FREE})
    _write(Encode(tower), encode, of_encode, ENCODE_INPUTS + times, folder / ENCODE_NAME)
    _write(Score(model, tasks), score, of_score, SCORE_INPUTS + times, folder / SCORE_NAME)


def _write(part: torch.nn.Module, example: tuple, free: tuple, names: tuple[str, ...], path: pathlib.Path) -> None:
    with _without_torchs_own_warnings():
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


@contextlib.contextmanager
def _without_torchs_own_warnings() -> collections.abc.Iterator[None]:
    """Drops two warnings of the exporter that no user can mend; all others are still shown.

    One names the operators of torchvision, which it looks for and no model here has. The other is of its own use of a
    deprecated class.
    """
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(_is_not_of_torchvision)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(_is_not_of_torchvision)


def _is_not_of_torchvision(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed")
