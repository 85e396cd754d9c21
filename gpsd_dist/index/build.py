"""Writes a version of a retrieval artefact from a checkpoint of a pretrained run."""

import dataclasses
import functools
import logging
import os
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from gpsd_dist import features
from gpsd_dist.checkpoint.files import Reader
from gpsd_dist.data.item_events import read_item_events
from gpsd_dist.disk.reading import raise_if_passing
from gpsd_dist.export import weights
from gpsd_dist.export.exporter import facts_of, read_source
from gpsd_dist.export.options import Options
from gpsd_dist.export.raw_requests import examples
from gpsd_dist.export.source import Source
from gpsd_dist.export.vocabularies import write_vocabularies
from gpsd_dist.model.heads import unit
from gpsd_dist.schema import NUM_RESERVED_ROWS
from gpsd_dist.serving.artefact import VERSIONS, Artefact, Draft, drafting, make_current
from gpsd_dist.serving.examples import EXPECTED_NAME, REQUESTS_NAME, tensors_of_search
from gpsd_dist.serving.retriever import CATALOGUE_NAME, EVENTS_NAME, ITEM_VECTORS, SCORING_NAME, Retriever
from gpsd_dist.serving.scorer import map_tables, open_reader, open_vocabularies
from gpsd_dist.serving.tables import PART_BYTES, write_part

log = logging.getLogger(__name__)
_SPLITS = ("valid", "train", "pretrain")  # where examples come from
Entries = dict[str, dict[str, typing.Any]]


def build(
    checkpoint: str | os.PathLike[str],
    data_dir: str,
    out: str | os.PathLike[str],
    which: str = "best",
    items: pathlib.Path | None = None,
) -> str:
    """Writes a version and makes it current; returns its name.

    `items`: Parquet file with the raw `item_id`s that are searched; None: all of the vocabulary. ValueError for a run
    that was not pretrained, or whose items have no vocabulary, where `items` must name them.
    """
    source = read_source(checkpoint, data_dir, which, with_candidates=False)
    run, manifest, reader = source.run, source.manifest, Reader(source.checkpoint)
    item = typing.cast(str, manifest.feature(manifest.item_feature).table)
    if item in manifest.unbounded and items is None:
        raise ValueError(
            f"items of table {item!r} are {manifest.unbounded[item]}, so the data keep no raw ids to answer with: give "
            "--items, a Parquet file with a column item_id of the raw ids to search"
        )
    read = {feature.table for feature in manifest.features_in("history")}
    of_histories = dataclasses.replace(manifest, tables=tuple(t for t in manifest.tables if t.name in read))
    with drafting(out) as draft:
        weights.write_dense(draft, reader, run, manifest)
        write_vocabularies(draft, pathlib.Path(run.data_dir), of_histories, reader)
        entries = weights.write_tables(draft, reader, run, manifest, "fp32")
        if items is None:
            entries[ITEM_VECTORS] = weights.write_table(draft, reader, manifest.table(item), run, "fp32", unit)
        else:
            preview = draft.preview(**facts_of(source, Options(), entries))
            entries[ITEM_VECTORS] = _write_catalogue(draft, preview, source, items)
        _write_scoring(draft, source)
        facts = facts_of(source, Options(), entries)
        _write_examples(draft, Retriever(draft.preview(**facts)), source)
        version = draft.commit(**facts)
    make_current(out, version)
    num_items = entries[ITEM_VECTORS]["num_rows"] - NUM_RESERVED_ROWS
    log.info("%s/%s/%s: %s items", out, VERSIONS, version, f"{num_items:,}")
    return version


def _write_scoring(draft: Draft, source: Source) -> None:
    """Writes what adds to the cosines of items, and the events that are counted for it; nothing for a plain model."""
    run, manifest = source.run, source.manifest
    if not (run.pretrain.item_bias or run.pretrain.recent_days):
        return
    names = ("item_bias", "recent_days")
    draft.write_json(SCORING_NAME, {name: getattr(run.pretrain, name) for name in names})
    if run.pretrain.recent_days:
        splits = [split.name for split in manifest.splits]
        events, _ = read_item_events(run.data_dir, manifest, splits)
        save_file(events.tensors(), draft.folder / EVENTS_NAME)


def _write_examples(draft: Draft, retriever: Retriever, source: Source) -> None:
    longest = source.run.data.max_history_length
    chosen = examples(pathlib.Path(source.run.data_dir), source.manifest, longest, 1, _SPLITS)
    columns = set(retriever.reader.columns)
    requests = [{name: value for name, value in request.items() if name in columns} for request in chosen]
    tokens = retriever.reader(retriever.reader.from_json(requests))
    save_file(tensors_of_search(retriever, tokens), draft.folder / EXPECTED_NAME)
    draft.write_json(REQUESTS_NAME, {"requests": requests})


def _item_ids(path: pathlib.Path) -> pa.ChunkedArray:
    try:
        return pq.read_table(path, columns=["item_id"])["item_id"]
    except (OSError, pa.ArrowException) as error:
        raise_if_passing(path, error)
        raise ValueError(f"--items {path}: expected a Parquet file with a column item_id ({error})") from error


def _write_catalogue(draft: Draft, preview: Artefact, source: Source, path: pathlib.Path) -> dict[str, typing.Any]:
    """Writes raw id and row of each item of a file, and their vectors; returns the entry of those.

    Ids that the run does not know, and of which it has learnt nothing, are counted and left out.
    """
    manifest = source.manifest
    feature = manifest.feature(manifest.item_feature)
    read = {f.table for f in manifest.features_in("history") if f.table is not None}
    reader = open_reader(preview, open_vocabularies(preview, sorted(read)), with_candidates=False)
    raw = pc.unique(reader.rules.missing(features.raw_ids(_item_ids(path))).drop_null())
    row_N = reader.served(feature, reader.encode(feature, raw))
    known = np.flatnonzero(row_N >= NUM_RESERVED_ROWS)
    log.info("%s items of %s, %s of them are not known to the run and left out", len(raw), path, len(raw) - len(known))
    if not len(known):
        raise ValueError(f"--items {path} names no item that the run knows; give raw ids as the log spells them")
    order = known[np.argsort(row_N[known], kind="stable")]
    pq.write_table(pa.table({"raw_id": raw.take(pa.array(order)), "row": row_N[order]}), draft.folder / CATALOGUE_NAME)
    table = map_tables(draft.root, preview.description.tables)[typing.cast(str, feature.table)]
    size, blobs = max(1, PART_BYTES // (4 * table.width)), []
    for first in range(0, len(order), size):
        vectors = unit(table.rows(row_N[order[first : first + size]]))
        if not first:  # the reserved rows of every table
            vectors = torch.cat([torch.zeros(NUM_RESERVED_ROWS, table.width), vectors])
        blobs.append(draft.add_blob(functools.partial(write_part, vectors, "fp32")))
    return {"dtype": "fp32", "num_rows": len(order) + NUM_RESERVED_ROWS, "width": table.width, "blobs": blobs}
