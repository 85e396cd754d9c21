"""Builds AdamW for the dense part, and gives every step its learning rate.

The optimizer of the tables is fused into their backward: `tables/sharding.py`.
"""

import math

import torch
from torch import nn

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


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Warms up linearly from 1 / warmup_steps to 1, then follows a cosine to `final_fraction`. Steps count from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
