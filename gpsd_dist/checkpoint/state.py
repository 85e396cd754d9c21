"""Reads and checks `run_state.json`, which has everything of a checkpoint but its tensors."""

import dataclasses
import json
import reprlib
import typing

from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.retention import STATE_NAME
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import run_config_from_dict
from gpsd_dist.metrics.early_stopping import EarlyStopping
from gpsd_dist.schema import manifest_from_dict
from gpsd_dist.validation import UnknownOptions, checked, unknown

_MAX_STEPS = 2**62
_WITH_ITS_VERSION = (
    "use that version (environment.json in the folder of the run names its commit), or start anew in another OUTPUT_DIR"
)


class OtherVersion(ValueError):
    """Raised where a file is whole, but has what this version does not know. That is no damage: no run falls back."""


@checked(is_finite=False)
class RunState:
    """Content of `run_state.json`."""

    step: int  # Optimizer steps done
    data_position: dict[str, typing.Any]  # `Loader.state_dict()`
    progress: dict[str, typing.Any]  # `EarlyStopping`: best step and metric so far, validations without improvement
    metrics: dict[str, float]  # Metrics of the validation at this step; empty if there was none
    run_config: dict[str, typing.Any]
    manifest: dict[str, typing.Any]
    world_size: int
    has_checksums: bool = False
    """Whether `checksums.json` was written; if so, its absence is damage. False in older checkpoints."""


def read_state(checkpoint: Location) -> RunState:
    """Reads the state without checking its parts.

    ValueError names the file if it is broken, OtherVersion if it is of a newer version; OSError if it cannot be read.
    """
    path = checkpoint / STATE_NAME
    try:
        raw = storage.read_json(path)
        younger = unknown(RunState, raw)
        state = RunState(**{name: value for name, value in raw.items() if name not in younger})
        _check_version(path, younger)
        if not (_is_count(state.step) and state.world_size >= 1):
            raise ValueError(f"step {state.step}, world_size {state.world_size}")
    except OtherVersion:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a run state ({error}); use another checkpoint") from error
    return state


def read_run(checkpoint: Location) -> RunState:
    """Reads the state and checks all parts that are used. Raises what `read_state` raises.

    An option or manifest field that did not exist when it was written has its default. OtherVersion if it has an
    option that this version does not have, or no longer has.
    """
    state = read_state(checkpoint)
    place = checkpoint / STATE_NAME
    try:
        run = dataclasses.asdict(run_config_from_dict(state.run_config))
        _check_version(place, [f"progress.{name}" for name in unknown(EarlyStopping, state.progress)])
        manifest = dataclasses.asdict(manifest_from_dict(state.manifest))
        progress = EarlyStopping(**state.progress)
        position, order = state.data_position, state.data_position.get("order")
        if not (_is_count(position.get("epoch")) and _is_count(position.get("step")) and isinstance(order, dict)):
            raise ValueError("data_position has no epoch, step and order")
        if not all(_is_count(order.get(name)) and order[name] > 0 for name in ("rows", "global_batch")):
            raise ValueError("the order of its data_position has no rows and global_batch above 0")
    except OtherVersion:
        raise
    except UnknownOptions as error:
        raise OtherVersion(f"{place} was {error}; {_WITH_ITS_VERSION}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} cannot be read as the state of a run ({error}); use another checkpoint") from error
    parts = {"run_config": run, "manifest": manifest, "progress": dataclasses.asdict(progress)}
    return dataclasses.replace(state, **json.loads(json.dumps(parts)))  # back to lists, as in the file


def as_then(manifest: dict[str, typing.Any], saved: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Leaves out quantiles of numbers for which a run has none: an older build of the same log measured none.

    `manifest`, `saved`: the data now and those of the run, as plain dicts.
    """
    had = {feature["name"] for feature in saved["features"] if feature.get("quantiles")}
    features = [feature if feature["name"] in had else feature | {"quantiles": []} for feature in manifest["features"]]
    return manifest | {"features": features}


def _check_version(path: Location, names: list[str]) -> None:
    if names:
        fields = ", ".join(map(reprlib.repr, names))
        raise OtherVersion(f"{path} was written by a newer version (unknown field {fields}); {_WITH_ITS_VERSION}")


def _is_count(value: typing.Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_STEPS
