"""Writes the weights of a checkpoint into an artefact: the dense model, and tables in parts as they are read.

A table is never whole in memory: one saved shard of it at a time.
"""

import collections.abc
import dataclasses
import functools
import typing

import torch
from safetensors.torch import save_file

from gpsd_dist.assembly import looked_up_tables, meta_model
from gpsd_dist.checkpoint.files import Reader
from gpsd_dist.config import RunConfig
from gpsd_dist.parameter_names import IDS, dense_weight, table_weight
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.serving import tables
from gpsd_dist.serving.artefact import Draft
from gpsd_dist.serving.scorer import MODEL_NAME, TOWER_NAME
from gpsd_dist.stages.finetune import trained_tasks
from gpsd_dist.tables.admission_filter import NO_ID


def write_dense(draft: Draft, reader: Reader, run: RunConfig, manifest: Manifest) -> None:
    """Writes the dense model and its options. ValueError if the checkpoint does not hold it."""
    expected = meta_model(run, manifest, looked_up_tables(run, manifest)).state_dict()
    weights = {name: _whole(reader, dense_weight(name), tuple(value.shape)) for name, value in expected.items()}
    save_file(weights, draft.folder / TOWER_NAME)
    options = {
        "model": dataclasses.asdict(run.model),
        "tables": dataclasses.asdict(run.tables),
        "tasks": [task.name for task in trained_tasks(run.finetune, manifest)],
        "offset": run.finetune.offset,
    }
    draft.write_json(MODEL_NAME, options)


def write_tables(
    draft: Draft, reader: Reader, run: RunConfig, manifest: Manifest, dtype: str
) -> dict[str, dict[str, typing.Any]]:
    """Writes the looked-up tables as blobs; returns their entries in the description.

    A table that was trained in fp16 (frozen) is exact in it, and stays so where `dtype` is fp32.
    """
    return {table.name: write_table(draft, reader, table, run, dtype) for table in looked_up_tables(run, manifest)}


def write_table(
    draft: Draft,
    reader: Reader,
    table: Table,
    run: RunConfig,
    dtype: str,
    convert: collections.abc.Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, typing.Any]:
    """Writes one table as blobs; returns its entry in the description. ValueError if it does not fit.

    `convert`: what to write of rows [N, E], instead of the rows themselves.
    """
    name, width = table_weight(table.name), run.tables.embedding_dim
    size, saved = _size_and_dtype(reader, name)
    if size != (table.num_rows, run.tables.stored_dim):
        raise ValueError(
            f"{name} has shape {size} in {reader.path}, expected {(table.num_rows, run.tables.stored_dim)}"
        )
    dtype = "fp16" if (dtype, saved, convert) == ("fp32", torch.float16, None) else dtype
    # Rows are stored padded (FBGEMM's kernels); the padding is zero and never read.
    shards: collections.abc.Iterable[torch.Tensor] = (shard[:, :width] for shard in reader.row_shards(name))
    shards = shards if convert is None else map(convert, shards)
    rows_per_part = max(1, tables.PART_BYTES // (4 * width))
    try:
        blobs = [
            draft.add_blob(functools.partial(tables.write_part, part, dtype))
            for part in tables.cut_into_parts(shards, rows_per_part)
        ]
    except ValueError as error:
        raise ValueError(f"table {table.name!r}: {error}") from error
    return {"dtype": dtype, "num_rows": table.num_rows, "width": width, "blobs": blobs}


def managed_rows(reader: Reader, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads which 64-bit id of a managed table has which row: (ids int64 [N], rows int64 [N])."""
    prefix = f"{IDS}.{table.name}"
    ids, rows = (torch.cat(list(reader.row_shards(f"{prefix}.{name}"))) for name in ("ids", "rows"))
    # The map has one row more than the table, for ids without a row of their own.
    is_owned = (ids != NO_ID) & (rows < table.num_rows)
    return ids[is_owned], rows[is_owned]


def lossy_tables(reader: Reader, names: collections.abc.Iterable[str], dtype: str) -> list[str]:
    """Lists the tables that lose digits in `dtype`."""
    exact = {"fp32": (torch.float32, torch.float16), "fp16": (torch.float16,)}.get(dtype, ())
    return [name for name in names if _size_and_dtype(reader, table_weight(name))[1] not in exact]


def _size_and_dtype(reader: Reader, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    entry = reader.index.state_dict_metadata.get(name)
    if entry is None:
        raise ValueError(f"{name} is not in {reader.path}; is it a finetuned run?")
    return tuple(entry.size), entry.properties.dtype


def _whole(reader: Reader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if _size_and_dtype(reader, name)[0] != shape:
        raise ValueError(f"{name} has another shape in {reader.path}, expected {shape}")
    return torch.cat(list(reader.row_shards(name))).contiguous() if shape else next(reader.row_shards(name))
