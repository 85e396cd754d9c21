"""Compares the tensors and options of two checkpoints: `python -m gpsd_dist.checkpoint diff`."""

import typing
import warnings

import rich.box
import rich.table
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gpsd_dist.checkpoint import files, integrity, manager
from gpsd_dist.disk.console import Console
from gpsd_dist.validation import flattened


def diff(first: str, second: str, console: Console) -> int:
    """Prints which tensors and options differ between two checkpoints; for a run, its best one. Returns 1 if any does.

    Holds two tensors at a time in memory.
    """
    left, right = manager.find(first), manager.find(second)
    for checkpoint in (left, right):
        integrity.check(checkpoint)
    states = [manager.read_state(checkpoint) for checkpoint in (left, right)]
    readers = [files.Reader(checkpoint) for checkpoint in (left, right)]
    saved = [reader.index.state_dict_metadata for reader in readers]
    table = rich.table.Table(box=rich.box.SIMPLE, title=f"A {left}\nB {right}", title_justify="left")
    for column in ("tensor or option", "difference"):
        table.add_column(column, overflow="fold")
    num_equal = 0
    for name in sorted(saved[0].keys() | saved[1].keys()):
        text = _tensor_difference(name, readers, saved)
        num_equal += not text
        if text:
            table.add_row(name, text)
    options = [{"step": state.step} | flattened(state.run_config) for state in states]
    for name in sorted(options[0].keys() | options[1].keys()):
        values = [entry.get(name, "not there") for entry in options]
        if values[0] != values[1]:
            table.add_row(f"option {name}" if name != "step" else name, f"A {values[0]!r}, B {values[1]!r}")
    console.print(table if table.row_count else f"A {left}\nB {right}\nsame tensors, step and options")
    console.print(f"{num_equal} of {len(saved[0].keys() | saved[1].keys())} tensors are equal")
    return 1 if table.row_count else 0


def _tensor_difference(name: str, readers: list[files.Reader], saved: list[dict[str, typing.Any]]) -> str:
    """Says how a tensor differs between two checkpoints; empty if it does not."""
    for entries, text in zip(saved, ("only in B", "only in A"), strict=True):
        if name not in entries:
            return text
    shapes = [tuple(entries[name].size) for entries in saved]
    kinds = [entries[name].properties.dtype for entries in saved]
    if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
        return f"A {shapes[0]} {kinds[0]}, B {shapes[1]} {kinds[1]}"
    one, two = (_read(name, reader, entries[name]) for reader, entries in zip(readers, saved, strict=True))
    if torch.equal(one, two):
        return ""
    distance = (one.double() - two.double()).abs()
    return f"max abs difference {distance.max():.3g}, in {int((distance != 0).sum()):,} of {one.numel():,} values"


def _read(name: str, reader: files.Reader, entry: TensorStorageMetadata) -> torch.Tensor:
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DCP warns that there is no process group; none is needed
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors[name]
