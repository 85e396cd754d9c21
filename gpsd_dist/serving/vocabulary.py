"""Finds the table row of an id in a mapped file: sorted ids and their rows.

A million ids take 12 MB, which the workers of a host share.
"""

import pathlib

import numpy as np
from safetensors.numpy import save_file

from gpsd_dist.schema import NUM_RESERVED_ROWS, UNKNOWN_INDEX
from gpsd_dist.serving.artefact import ArtefactError
from gpsd_dist.serving.tables import read_tensors


class Vocabulary:
    """Maps ids (`features.id_of`) to rows of one embedding table."""

    def __init__(self, id_V: np.ndarray, row_V: np.ndarray):
        """`id_V` int64 [V], ascending; `row_V` int32 [V], each at least 2."""
        self.id_V, self.row_V = id_V, row_V

    @staticmethod
    def write(path: pathlib.Path, id_V: np.ndarray, row_V: np.ndarray) -> None:
        """Writes ids (int64 [V], any order) with their rows. ValueError where two raw ids have one id."""
        order = np.argsort(id_V, kind="stable")
        id_V, row_V = id_V[order], row_V[order]
        same = np.flatnonzero(id_V[1:] == id_V[:-1])
        if len(same):
            rows = row_V[same[0] : same[0] + 2].tolist()
            raise ValueError(
                f"the raw ids of rows {rows} have one id, {id_V[same[0]]}, as 60 bits of md5; expected different ids: "
                "rename one of the two in the log and build the data set again"
            )
        if len(row_V) and not (row_V.min() >= NUM_RESERVED_ROWS and row_V.max() < 2**31):
            raise ValueError(f"rows {row_V.min()} .. {row_V.max()}, expected {NUM_RESERVED_ROWS} .. {2**31 - 1}")
        save_file({"id": id_V.astype(np.int64), "row": row_V.astype(np.int32)}, path)

    @staticmethod
    def open(path: pathlib.Path, num_rows: int) -> "Vocabulary":
        """Maps a written file of a table of `num_rows` rows. ArtefactError where it is damaged, or names other rows."""
        arrays = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
        id_V, row_V = arrays.get("id"), arrays.get("row")
        if id_V is None or row_V is None or (id_V.dtype, row_V.dtype) != (np.int64, np.int32):
            raise ArtefactError(f"{path} holds {sorted(arrays)}, expected ids and rows; export the artefact again")
        if id_V.ndim != 1 or id_V.shape != row_V.shape:
            raise ArtefactError(f"{path} holds {id_V.shape} ids and {row_V.shape} rows; export the artefact again")
        if len(row_V) and not NUM_RESERVED_ROWS <= row_V.min() <= row_V.max() < num_rows:
            expected = f"{NUM_RESERVED_ROWS} .. {num_rows - 1}"
            raise ArtefactError(
                f"{path} names rows {row_V.min()} .. {row_V.max()}, expected {expected}; export the artefact again"
            )
        return Vocabulary(id_V, row_V)

    def __len__(self) -> int:
        return len(self.id_V)

    def rows(self, id_N: np.ndarray) -> np.ndarray:
        """Finds the rows of ids int64 [N]: int64 [N], 1 (unknown) where an id has none."""
        if not len(self.id_V):
            return np.full(len(id_N), UNKNOWN_INDEX, np.int64)
        place_N = np.minimum(np.searchsorted(self.id_V, id_N), len(self.id_V) - 1)
        return np.where(self.id_V[place_N] == id_N, self.row_V[place_N].astype(np.int64), UNKNOWN_INDEX)
