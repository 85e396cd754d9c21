"""Writes a version of a retrieval artefact from a checkpoint of a pretrained run."""

import dataclasses
import logging
import os
import pathlib
import typing

from gpsd_dist.checkpoint.files import Reader
from gpsd_dist.export import weights
from gpsd_dist.export.exporter import facts_of, read_source
from gpsd_dist.export.source import Options
from gpsd_dist.export.vocabularies import write_vocabularies
from gpsd_dist.model.heads import unit
from gpsd_dist.serving.artefact import VERSIONS, drafting, make_current
from gpsd_dist.serving.retriever import ITEM_VECTORS, Retriever

log = logging.getLogger(__name__)


def build(checkpoint: str | os.PathLike[str], data_dir: str, out: str | os.PathLike[str], which: str = "best") -> str:
    """Writes a version and makes it current; returns its name.

    ValueError for a run that was not pretrained, or whose items have no vocabulary and so no raw ids to answer with.
    """
    source = read_source(checkpoint, data_dir, which, with_candidates=False)
    run, manifest, reader = source.run, source.manifest, Reader(source.checkpoint)
    item = typing.cast(str, manifest.feature(manifest.item_feature).table)
    if item in manifest.unbounded:
        raise ValueError(
            f"items of table {item!r} are {manifest.unbounded[item]}, so their raw ids are not kept; build the data "
            "with a vocabulary of items, and pretrain on it"
        )
    read = {feature.table for feature in manifest.features_in("history")}
    of_histories = dataclasses.replace(manifest, tables=tuple(t for t in manifest.tables if t.name in read))
    with drafting(out) as draft:
        weights.write_dense(draft, reader, run, manifest)
        write_vocabularies(draft, pathlib.Path(run.data_dir), of_histories, reader)
        entries = weights.write_tables(draft, reader, run, manifest, "fp32")
        entries[ITEM_VECTORS] = weights.write_table(draft, reader, manifest.table(item), run, "fp32", unit)
        facts = facts_of(source, Options(), entries)
        Retriever(draft.preview(**facts))  # whatever cannot be loaded is not made current
        version = draft.commit(**facts)
    make_current(out, version)
    log.info("%s/%s/%s: %s items", out, VERSIONS, version, f"{manifest.table(item).num_rows - 2:,}")
    return version
