"""Learning rate as a pure function of the step, the same for dense and sparse parameters."""

import math


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up from 1 / warmup_steps to 1, then cosine to `final_fraction` (1: constant). Steps count from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
