"""Writes and reads the scores of single candidates, so that models can be compared user by user."""

import collections.abc
import io
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist.disk.reading import NotReadableNow, again
from gpsd_dist.metrics.classification import Predictions

SCHEMA = pa.schema(
    [("task", pa.dictionary(pa.int32(), pa.string())), ("user_hash", pa.int64()), ("label", pa.uint8())]
    + [("score", pa.float32()), ("day", pa.int32())]
)
"""One row per candidate and task that was scored, in any order within a task. user_hash is that of the data, `score` a
model's logit, `day` the UTC day of the request (-1: unknown)."""
Columns = dict[str, np.ndarray]  # user_hash int64, label uint8, score float32, day int32, each [N]


def scores_file(predictions: collections.abc.Mapping[str, Predictions]) -> bytes:
    """Makes the content of a Parquet file of SCHEMA."""
    content = io.BytesIO()
    with pq.ParquetWriter(content, SCHEMA) as writer:
        for task, rows in predictions.items():
            score_N, label_N, user_hash_N, day_N = rows.arrays()[:4]
            task_N = pa.DictionaryArray.from_arrays(np.zeros(len(score_N), np.int32), [task])
            writer.write_table(pa.table([task_N, user_hash_N, label_N, score_N, day_N], schema=SCHEMA))
    return content.getvalue()


def read_scores(path: str | os.PathLike) -> dict[str, Columns]:
    """Reads task -> columns. ValueError if the file is missing, broken or no such file."""
    try:
        table = again(path, lambda: pq.read_table(pathlib.Path(path))).cast(SCHEMA)
    except NotReadableNow:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} holds no scores of gpsd_dist.evaluate --scores_out ({error})") from error
    names = pc.unique(table["task"].cast(pa.string())).to_pylist()
    parts = {name: table.filter(pc.equal(table["task"], name)) for name in names}
    return {name: {column: part[column].to_numpy() for column in SCHEMA.names[1:]} for name, part in parts.items()}
