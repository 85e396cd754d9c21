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
        return half_width(self.influence_U)

    def minus(self, other: "AucByUser") -> tuple[float, float]:
        """Returns the difference of both AUCs and its half width; ValueError if they are not of the same users."""
        if not np.array_equal(self.user_hash_U, other.user_hash_U):
            raise ValueError("the two AUCs are of other users: score the same split of the same data")
        return self.auc - other.auc, half_width(self.influence_U - other.influence_U)


def auc_by_user(
    score_N: np.ndarray, label_N: np.ndarray, user_hash_N: np.ndarray, weight_N: np.ndarray | None = None
) -> AucByUser:
    """Computes an AUC with each user's influence: DeLong's variance for clusters of rows. ValueError for one class.

    Obuchowski, Biometrics 53 (1997), 567-578: a row's placement is the share of the other class that it is on the right
    side of; a user's influence sums how far placements of the own rows are from the AUC. With `weight_N` a row counts
    that often.
    """
    is_positive_N = np.asarray(label_N) == 1
    weight_N = np.ones(len(is_positive_N)) if weight_N is None else np.asarray(weight_N, np.float64)
    positives, negatives = weight_N[is_positive_N].sum(), weight_N[~is_positive_N].sum()
    if not positives or not negatives:
        raise ValueError(f"an AUC needs both classes, there are {positives:g} positives and {negatives:g} negatives")
    score_N = np.asarray(score_N, np.float32)
    placement_N = np.empty(len(score_N))
    positive, negative = ((score_N[mask_N], weight_N[mask_N]) for mask_N in (is_positive_N, ~is_positive_N))
    placement_N[is_positive_N] = _share_below(*negative, positive[0])
    placement_N[~is_positive_N] = 1 - _share_below(*positive, negative[0])
    auc = float((placement_N * weight_N)[is_positive_N].sum() / positives)
    weight_N = weight_N * np.where(is_positive_N, 1 / positives, 1 / negatives)
    user_hash_U, user_N = np.unique(np.asarray(user_hash_N, np.int64), return_inverse=True)
    influence_U = np.bincount(user_N, (placement_N - auc) * weight_N, minlength=len(user_hash_U))
    return AucByUser(auc, user_hash_U, influence_U)


def _share_below(value_M: np.ndarray, weight_M: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Says which share of the values, by weight, is below each score; a tie counts half."""
    order_M = np.argsort(value_M, kind="stable")
    value_M, before_M1 = value_M[order_M], np.append(0.0, np.cumsum(weight_M[order_M]))
    below_N, upto_N = (before_M1[np.searchsorted(value_M, score_N, side=side)] for side in ("left", "right"))
    return (below_N + upto_N) / (2 * before_M1[-1])


def half_width(influence_U: np.ndarray) -> float:
    """Gives the half width of what moves by `influence_U` with each user; NaN without two users."""
    users = len(influence_U)
    return Z_95 * math.sqrt(users / (users - 1) * float((influence_U**2).sum())) if users > 1 else math.nan
