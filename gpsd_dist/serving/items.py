"""Keeps the attributes of every known item (`items.parquet` of the data set) in one mapped file."""

import pathlib

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from gpsd_dist.batch.packing import cuts
from gpsd_dist.batch.row_layout import ranges
from gpsd_dist.data.gather import one_chunk
from gpsd_dist.features import Values
from gpsd_dist.schema import UNKNOWN_INDEX, Feature, Manifest
from gpsd_dist.serving.artefact import ArtefactError
from gpsd_dist.serving.tables import read_tensors

_INDEX = "index"


class Items:
    """Gives the attributes of items as the columns of the data set hold them: indices or 64-bit ids, float32, bags."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        """`arrays`: `index` (int64, ascending), per attribute its values, and `<attribute>.offsets` of a bag."""
        self._index_V, self._arrays = arrays[_INDEX], arrays
        self.attributes = frozenset(name for name in arrays if name != _INDEX and not name.endswith(".offsets"))

    @staticmethod
    def write(path: pathlib.Path, items_parquet: pathlib.Path, manifest: Manifest) -> None:
        """Rewrites `items.parquet` of a data set. ValueError for a column that is no feature of the manifest."""
        table = pq.read_table(items_parquet).sort_by(_INDEX)
        arrays = {_INDEX: one_chunk(table[_INDEX]).to_numpy()}
        for name in table.column_names:
            if name == _INDEX:
                continue
            feature, values = manifest.feature(name), one_chunk(table[name])
            if feature.is_bag:
                arrays[f"{name}.offsets"] = cuts(values.value_lengths().to_numpy())
                values = values.flatten()
            arrays[name] = values.to_numpy()
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)

    @staticmethod
    def open(path: pathlib.Path) -> "Items":
        """Maps a written file. ArtefactError where it is damaged."""
        arrays = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
        if _INDEX not in arrays or arrays[_INDEX].dtype != np.int64:
            raise ArtefactError(f"{path} holds {sorted(arrays)}, expected int64 {_INDEX!r}; export the artefact again")
        for name, array in arrays.items():
            is_values = f"{name}.offsets" in arrays
            expected = len(arrays[_INDEX]) + name.endswith(".offsets")
            if array.ndim != 1 or (not is_values and len(array) != expected):
                raise ArtefactError(f"{path}: {name!r} has shape {array.shape}, expected [{expected}]; export it again")
        return Items(arrays)

    def check(self, manifest: Manifest) -> None:
        """Reads all values. ValueError where an attribute is no feature, or names a row that its table lacks."""
        for name in sorted(self.attributes):
            feature, values = manifest.feature(name), self._arrays[name]
            if feature.is_bag:
                offsets = self._arrays.get(f"{name}.offsets", np.empty(0, np.int64))
                if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
                    raise ValueError(f"{name!r} has offsets that do not cut its {len(values)} values into bags")
            if feature.table is None or not len(values):
                continue
            limit = manifest.value_limit(feature.table)
            if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= limit:
                found = f"{values.dtype} from {values.min()} to {values.max()}"
                raise ValueError(f"{name!r} holds {found}, expected integers below {limit}")

    def places(self, index_N: np.ndarray) -> np.ndarray:
        """Finds items by the index (or 64-bit id) of the item table: int64 [N], -1 where it is not known."""
        if not len(self._index_V):
            return np.full(len(index_N), -1, np.int64)
        place_N = np.minimum(np.searchsorted(self._index_V, index_N), len(self._index_V) - 1)
        return np.where(self._index_V[place_N] == index_N, place_N, -1)

    def take(self, feature: Feature, place_N: np.ndarray) -> Values:
        """Takes an attribute of the items at `places`; one that is not known has 0.0, 1 or the bag [1]."""
        if not len(self._index_V):
            return missing(feature, len(place_N))
        values = self._arrays[feature.name]
        if not feature.is_bag and (place_N >= 0).all():
            return values[place_N]
        is_known_N, place_N = place_N >= 0, np.maximum(place_N, 0)
        if not feature.is_bag:
            return np.where(is_known_N, values[place_N], missing(feature, 1)[0])
        offsets = self._arrays[f"{feature.name}.offsets"]
        size_N = np.where(is_known_N, offsets[place_N + 1] - offsets[place_N], 1)
        found = values[ranges(np.where(is_known_N, offsets[place_N], 0), size_N)]
        return np.where(np.repeat(is_known_N, size_N), found, UNKNOWN_INDEX), cuts(size_N)


def missing(feature: Feature, num_values: int) -> Values:
    """Makes the values of items that nothing is known about."""
    if feature.kind == "numerical":
        return np.zeros(num_values, np.float32)
    unknown = np.full(num_values, UNKNOWN_INDEX, np.int64)
    return (unknown, np.arange(num_values + 1)) if feature.is_bag else unknown
