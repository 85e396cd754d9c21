"""Builds AdamW for the dense part, averages what it makes, and gives every step its learning rate.

The optimizer of the tables is fused into their backward: `tables/sharding.py`.
"""

import contextlib
import math
import typing

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gpsd_dist.config import OptimizerConfig


def dense_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Builds AdamW over all parameters; only matrices of linear layers decay (not norms, biases or small tables)."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in linear], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in linear], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=betas, eps=config.eps, fused=True)


def named_state(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Returns parameter name -> {"step", "exp_avg", "exp_avg_sq"}: the live state, which is allocated if missing."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = optimizer.state[parameter]
            if not entry:
                entry["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                entry["exp_avg"] = torch.zeros_like(parameter)
                entry["exp_avg_sq"] = torch.zeros_like(parameter)
            state[names[id(parameter)]] = dict(entry)
    return state


class WeightAverage:
    """Keeps a mean of the dense weights, and puts it in their place for a while.

    A batch moves weights by what is noise as well, and their mean loses most of that. Step n of N counts about
    (n / N) ^ (1 / fraction - 1), so the mean reaches back over the last `fraction` of the steps, however many they are
    (the power function of arXiv:2312.02696, section 3.1). Fraction 0: nothing is kept, weights stay in their place.
    """

    def __init__(self, model: nn.Module, fraction: float):
        self._model, self._fraction = model, fraction
        # Listed once: under FSDP2 a module shows gathered copies in their place between a forward and its backward.
        parameters = dict(model.named_parameters()) if fraction else {}
        self._last = [parameter.detach() for parameter in parameters.values()]
        self.other = {name: last.clone() for name, last in zip(parameters, self._last)}
        """Parameter -> its mean; within `in_place`, its last weights."""

    def update(self, step: int) -> None:
        """Adds the weights after `step`, which counts from 0; those of step 0 are the first mean."""
        if self.other:
            torch._foreach_lerp_(list(self.other.values()), self._last, 1 / (1 + self._fraction * step))

    @contextlib.contextmanager
    def in_place(self) -> typing.Iterator[None]:
        """Lets the model compute with the means, in the memory of its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, other in zip(self._last, self.other.values(), strict=True):
            kept = weight.clone()
            weight.copy_(other)
            other.copy_(kept)
        for module in self._model.modules() if self.other else ():
            if isinstance(module, FSDPModule):
                module.reshard()  # frees what was gathered from the weights of before


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Warms up linearly from 1 / warmup_steps to 1, then follows a cosine to `final_fraction`. Steps count from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
