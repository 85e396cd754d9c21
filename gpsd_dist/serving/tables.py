"""Stores embedding tables as parts in safetensors, and reads rows of them through memory maps.

A mapped table takes no memory of its own: processes share its pages, and a billion rows open at once. Parts have a
fixed number of rows, so that an equal table makes equal files, whatever number of ranks saved it.

Shape letters: N rows of a part, U distinct rows wanted, E width.
"""

import collections.abc
import pathlib

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpsd_dist.disk.reading import raise_if_passing
from gpsd_dist.serving.artefact import DTYPES, ArtefactError

PART_BYTES = 2**28  # of float32, untuned: a table of a billion rows of 64 has a thousand parts
_LEVELS = 255
_ROWS, _CODES, _SCALE, _OFFSET = "rows", "codes", "scale", "offset"
_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def encode(rows_NE: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Converts rows to what is stored: fp32, fp16, or int8 with scale and offset per row (x = code * scale + offset).

    ValueError if a value is not finite, or not so in fp16.
    """
    if dtype == "int8":
        wide = rows_NE.float()
        low_N, high_N = wide.amin(1), wide.amax(1)
        scale_N = (high_N - low_N) / _LEVELS
        steps = torch.where(scale_N > 0, scale_N, 1.0)[:, None]
        codes = ((wide - low_N[:, None]) / steps).round_().clamp_(0, _LEVELS).to(torch.uint8)
        stored = {_CODES: codes, _SCALE: scale_N, _OFFSET: low_N}
    else:
        stored = {_ROWS: rows_NE.to(_TORCH_DTYPES[dtype]).contiguous()}
    for values in stored.values():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise ValueError(f"it holds values that are not finite in {dtype}; export it as fp32, or train it anew")
    return stored


def write_part(rows_NE: torch.Tensor, dtype: str, path: pathlib.Path) -> None:
    """Writes the rows of one part."""
    save_file(encode(rows_NE, dtype), path)


def cut_into_parts(
    shards: collections.abc.Iterable[torch.Tensor], rows_per_part: int
) -> collections.abc.Iterator[torch.Tensor]:
    """Cuts a table that comes in shards of any number of rows, in their order, into parts of `rows_per_part`."""
    held: list[torch.Tensor] = []
    missing = rows_per_part
    for shard in shards:
        while len(shard):
            held.append(shard[:missing])
            shard = shard[missing:]
            missing -= len(held[-1])
            if not missing:
                yield torch.cat(held) if len(held) > 1 else held[0]
                held, missing = [], rows_per_part
    if held:
        yield torch.cat(held)


class MappedTable:
    """Reads rows of one table. Immutable, safe to use from several threads."""

    def __init__(self, name: str, paths: collections.abc.Sequence[pathlib.Path], dtype: str, num_rows: int, width: int):
        """Maps the parts. ArtefactError if they are not `num_rows` rows of `width` in `dtype`."""
        self.name, self.dtype, self.num_rows, self.width = name, dtype, num_rows, width
        self._parts = [_mapped(path, dtype, width) for path in paths]
        sizes = [len(next(iter(part.values()))) for part in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if self._starts[-1] != num_rows:
            raise ArtefactError(
                f"the parts of table {name!r} have {self._starts[-1]:,} rows, {num_rows:,} are described; export again"
            )

    def rows(self, index_U: np.ndarray) -> torch.Tensor:
        """Returns rows float32 [U, E] for ascending int64 [U]. IndexError if the table has no such row."""
        if len(index_U) and not 0 <= index_U[0] <= index_U[-1] < self.num_rows:
            raise IndexError(f"rows {index_U[0]} .. {index_U[-1]} of table {self.name!r}, which has {self.num_rows:,}")
        if len(self._parts) == 1:
            return _decoded(self._parts[0], torch.from_numpy(index_U))
        cuts = np.searchsorted(index_U, self._starts)
        pieces = [
            _decoded(part, torch.from_numpy(index_U[start:stop] - first))
            for part, start, stop, first in zip(self._parts, cuts[:-1], cuts[1:], self._starts, strict=False)
            if start < stop
        ]
        return torch.cat(pieces) if pieces else torch.zeros(0, self.width)

    def block(self, first: int, stop: int) -> torch.Tensor:
        """Returns the rows first ... stop - 1, float32 [R, E]; of one part of an fp32 table without a copy."""
        pieces = []
        for part, start in zip(self._parts, self._starts, strict=False):
            rows = {name: values[max(first - start, 0) : max(stop - start, 0)] for name, values in part.items()}
            if len(next(iter(rows.values()))):
                pieces.append(_whole(rows))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _decoded(part: dict[str, torch.Tensor], index_U: torch.Tensor) -> torch.Tensor:
    return _whole({name: values.index_select(0, index_U) for name, values in part.items()})


def _whole(part: dict[str, torch.Tensor]) -> torch.Tensor:
    if _ROWS in part:
        return part[_ROWS].float()
    codes, scale, offset = (part[name] for name in (_CODES, _SCALE, _OFFSET))
    return torch.addcmul(offset[:, None], codes.float(), scale[:, None])


def _mapped(path: pathlib.Path, dtype: str, width: int) -> dict[str, torch.Tensor]:
    tensors = read_tensors(path)
    found = {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in tensors.items()}
    rows = len(next(iter(tensors.values()), ()))
    if dtype == "int8":
        expected = {_CODES: ("uint8", (rows, width)), _SCALE: ("float32", (rows,)), _OFFSET: ("float32", (rows,))}
    elif dtype in _TORCH_DTYPES:
        expected = {_ROWS: (str(_TORCH_DTYPES[dtype]).removeprefix("torch."), (rows, width))}
    else:
        raise ArtefactError(f"{path}: dtype {dtype!r} is none of {DTYPES}; export again")
    if found != expected:
        raise ArtefactError(f"{path} holds {found}, expected {expected}; copy or export it again")
    return tensors


def read_tensors(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Maps all tensors of a safetensors file; they are read when they are used. ArtefactError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise_if_passing(path, error)
        raise ArtefactError(f"{path} is no safetensors file of ours ({error}); copy or export it again") from error
