"""Loads tensors of a checkpoint into live state at any world size, or lists them."""

import typing

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from gpsd_dist.checkpoint import files, growth, integrity
from gpsd_dist.checkpoint.index import read_index
from gpsd_dist.checkpoint.integrity import DamagedCheckpoint
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.disk import reading
from gpsd_dist.validation import flattened

Tensors = dict[str, typing.Any]  # Nested dict of tensors and ShardedTensors that alias the live state


def load_tensors(checkpoint: Location, tensors: Tensors, grown: frozenset[str] = frozenset()) -> None:
    """Verifies the checkpoint, then fills `tensors` in place, resharding as needed. Collective.

    `grown`: dotted names of tensors that may have more rows here; those beyond the saved ones are left alone.
    ValueError lists damaged files, or keys and shapes that do not fit.
    """
    integrity.check(checkpoint)
    fill_tensors(checkpoint, tensors, grown)


def fill_tensors(checkpoint: Location, tensors: Tensors, grown: frozenset[str] = frozenset()) -> None:
    """Fills `tensors` like `load_tensors`, from a checkpoint that was verified before. Collective."""
    reader = files.Reader(checkpoint)
    saved = reader.index.state_dict_metadata
    problems = []
    for key, value in flattened(tensors).items():
        if isinstance(value, dict):
            continue  # an empty part
        if key not in saved:
            problems.append(f"{key} is not in it")
        elif not growth.fits(tuple(saved[key].size), tuple(value.size()), key in grown):
            problems.append(f"{key} has shape {tuple(saved[key].size)} there and {tuple(value.size())} here")
    if problems:
        raise ValueError(f"checkpoint {checkpoint} does not fit this model: " + "; ".join(problems[:8]))

    def load() -> None:
        try:
            dcp.load(tensors, storage_reader=reader, planner=growth.Planner(grown))
        except CheckpointException as error:
            if (passing := files.passing_failure(error)) is not None:
                raise passing from error  # on all ranks, so they try again together
            raise DamagedCheckpoint(f"checkpoint {checkpoint} cannot be read: {files.first_failure(error)}") from error

    reading.again(checkpoint, load)


def saved_keys(checkpoint: Location) -> list[str]:
    """Lists the dotted names of all tensors in a checkpoint."""
    return sorted(read_index(checkpoint).state_dict_metadata)


def saved_sizes(checkpoint: Location) -> dict[str, int]:
    """Maps the dotted name of every tensor to its number of elements. Reads no tensor, needs no process group."""
    saved = read_index(checkpoint).state_dict_metadata
    return {name: value.size.numel() for name, value in sorted(saved.items())}
