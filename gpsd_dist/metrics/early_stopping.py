"""What the training loop has reached: the best validation so far, and whether the run is over."""

import dataclasses
import math


@dataclasses.dataclass
class Progression:
    """Saved with every checkpoint, where `best_step` says which checkpoint is the best one."""

    best_value: float = -math.inf
    best_step: int = -1
    stale: int = 0
    """Validations since the best one."""
    is_finished: bool = False

    def judge(self, value: float, step: int) -> None:
        """Counts a validation at `step`; a larger value is better, and any number is better than NaN."""
        if value > self.best_value or self.best_step < 0 or math.isnan(self.best_value):
            self.best_value, self.best_step, self.stale = value, step, 0
        else:
            self.stale += 1
