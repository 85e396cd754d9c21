"""Remembers the best validation of a run, and says when patience has run out."""

import math

from gpsd_dist.validation import checked


@checked(frozen=False, is_finite=False)
class EarlyStopping:
    """Tracks the best validation. It is saved with every checkpoint; `best_step` names the best checkpoint."""

    best_value: float = -math.inf
    best_step: int = -1
    stale: int = 0  # Validations since the best one, without those of the warm-up. Checkpoints have it by this name.
    is_finished: bool = False

    def update(self, value: float, step: int, *, in_warmup: bool = False) -> None:
        """Counts a validation at `step`; a larger value is better, and any number is better than NaN.

        A validation `in_warmup` may be the best, but uses up no patience: small rates say nothing about larger ones.
        NaN (AUC where a split has one class) is no progress: the newest one is the best only while nothing else is.
        """
        if not math.isnan(value) and (value > self.best_value or self.best_step < 0 or math.isnan(self.best_value)):
            self.best_value, self.best_step, self.stale = value, step, 0
            return
        if self.best_step < 0 or math.isnan(self.best_value):
            self.best_value, self.best_step = value, step
        self.stale += not in_warmup

    def is_out_of_patience(self, patience: int) -> bool:
        """Says whether `patience` validations in a row were no better; 0 never stops."""
        return 0 < patience <= self.stale
