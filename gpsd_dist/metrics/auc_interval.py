"""Says how far an AUC may be from its true value, and a difference of two AUCs on the same users from theirs.

All widths are half widths of 95 % intervals by the normal approximation. They are about the rows that were scored:
another seed of the training is another model, and not covered. Shape letters: N rows, U users.
"""

import dataclasses
import math

import numpy as np

Z_95 = 1.959964  # quantile of the normal distribution


def half_width_of_counts(auc: float, positives: int, negatives: int) -> float:
    """Estimates the half width from an AUC and its numbers of rows alone; NaN without both classes.

    Hanley and McNeil, Radiology 143 (1982), 29-36. Rows count as independent, so it is too small where the rows of a
    user are alike.
    """
    if min(positives, negatives) < 1 or not 0 <= auc <= 1:
        return math.nan
    of_two_positives, of_two_negatives = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc)
    variance += (positives - 1) * (of_two_positives - auc**2) + (negatives - 1) * (of_two_negatives - auc**2)
    return Z_95 * math.sqrt(max(variance, 0.0) / (positives * negatives))


@dataclasses.dataclass(frozen=True)
class AucByUser:
    """Holds an AUC and how much each user moves it; rows of one user need not be independent."""

    auc: float
    user_hash_U: np.ndarray  # int64, sorted
    influence_U: np.ndarray  # float64; sums to 0

    @property
    def half_width(self) -> float:
        """Half width of the AUC's interval; NaN without two users."""
        return _half_width(self.influence_U)

    def minus(self, other: "AucByUser") -> tuple[float, float]:
        """Returns the difference of both AUCs and its half width; ValueError if they are not of the same users."""
        if not np.array_equal(self.user_hash_U, other.user_hash_U):
            raise ValueError("the two AUCs are of other users: score the same split of the same data")
        return self.auc - other.auc, _half_width(self.influence_U - other.influence_U)


def auc_by_user(score_N: np.ndarray, label_N: np.ndarray, user_hash_N: np.ndarray) -> AucByUser:
    """Computes an AUC with each user's influence: DeLong's variance for clusters of rows. ValueError for one class.

    Obuchowski, Biometrics 53 (1997), 567-578: a row's placement is the share of the other class that it is on the right
    side of; a user's influence sums how far placements of the own rows are from the AUC.
    """
    is_positive_N = np.asarray(label_N) == 1
    positives, negatives = int(is_positive_N.sum()), int((~is_positive_N).sum())
    if not positives or not negatives:
        raise ValueError(f"an AUC needs both classes, there are {positives} positives and {negatives} negatives")
    score_N = np.asarray(score_N, np.float32)
    placement_N = np.empty(len(score_N))
    placement_N[is_positive_N] = _share_below(np.sort(score_N[~is_positive_N]), score_N[is_positive_N])
    placement_N[~is_positive_N] = 1 - _share_below(np.sort(score_N[is_positive_N]), score_N[~is_positive_N])
    auc = float(placement_N[is_positive_N].mean())
    weight_N = np.where(is_positive_N, 1 / positives, 1 / negatives)
    user_hash_U, user_N = np.unique(np.asarray(user_hash_N, np.int64), return_inverse=True)
    influence_U = np.bincount(user_N, (placement_N - auc) * weight_N, minlength=len(user_hash_U))
    return AucByUser(auc, user_hash_U, influence_U)


def _share_below(sorted_M: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Says which share of sorted values is below each score; a tie counts half."""
    below_N, upto_N = (np.searchsorted(sorted_M, score_N, side=side) for side in ("left", "right"))
    return (below_N + upto_N) / (2 * len(sorted_M))


def _half_width(influence_U: np.ndarray) -> float:
    users = len(influence_U)
    return Z_95 * math.sqrt(users / (users - 1) * float((influence_U**2).sum())) if users > 1 else math.nan
