"""Settles at the start of a run in which precision a CPU multiplies: ExecutionConfig.matmul_dtype."""

import dataclasses
import logging
import typing

import torch

from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.collectives import all_sum
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.model.ops.products import has_bf16_products

log = logging.getLogger(__name__)


def settle(run: RunConfig, saved: dict[str, typing.Any] | None, runtime: Runtime) -> RunConfig:
    """Returns the run with "fp32" or "bf16" for `matmul_dtype`, and logs which. Collective.

    `saved`: options of the run that this one resumes. ValueError if "bf16" is asked for where a rank's CPU cannot; a
    resumed run, and one that has it from `TrainConfig.bf16` alone, goes on in float32 and says so. On GPUs the option
    does nothing and stays as it was given, and ValueError says where `TrainConfig.bf16` cannot run.
    """
    asked = run.execution.matmul_dtype
    recorded = (saved or {}).get("execution", {}).get("matmul_dtype", "auto")
    if runtime.device.type == "cuda":
        if run.train.bf16 and not _everywhere(torch.cuda.get_device_capability(runtime.device) >= (8, 0)):
            raise ValueError(
                "TrainConfig.bf16: a GPU of this run is older than Ampere (compute capability 8.0) and has neither "
                "bf16 products nor the attention kernel; leave bf16 out, or use newer GPUs"
            )
        return run
    if asked != "auto":
        chosen = asked
    elif recorded != "auto":
        chosen = recorded
    else:
        chosen = "bf16" if run.train.bf16 else "fp32"
    if chosen == "bf16" and not _everywhere(has_bf16_products()):
        lacking = "a CPU of this run has neither AVX512_BF16 nor AMX"
        if asked == "bf16" and recorded != "bf16":
            raise ValueError(
                f"ExecutionConfig.matmul_dtype 'bf16': {lacking}, so float32 is faster there; "
                "set it to 'fp32' or leave it out"
            )
        log.warning("%s: products go on in float32, where bf16 was %s", lacking, "asked for" if not saved else "used")
        chosen = "fp32"
    elif saved and recorded not in ("auto", chosen):
        log.warning("products are in %s from here on; this run was in %s", chosen, recorded)
    log.info("products of the dense part: %s", "bfloat16 operands" if chosen == "bf16" else "float32")
    return dataclasses.replace(run, execution=dataclasses.replace(run.execution, matmul_dtype=chosen))


def _everywhere(is_able: bool) -> bool:
    """Says whether all ranks are able. Collective."""
    return not int(all_sum(torch.tensor(int(not is_able))))


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """Returns the context of `TrainConfig.bf16` on a GPU. On a CPU it does nothing: `matmul_dtype` stands there."""
    return torch.autocast(device.type, torch.bfloat16, enabled=run.train.bf16 and device.type == "cuda")
