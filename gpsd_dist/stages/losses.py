"""Computes losses. Each returns its sum over a batch; the stage counts, and the training step divides by the count over
all ranks, so that the result does not depend on how rows fell on ranks.

Shape letters: M next-item positions, G negative groups, N negatives per group, E embedding width, C candidates.
"""

import itertools

import torch
import torch.nn.functional as F

from gpsd_dist.model.heads import unit
from gpsd_dist.model.ops.products import operand

CHUNK_ELEMENTS = 1 << 21  # floats of gathered rows: 8 MiB stay in a cache; 0.04 s per 1000 positions x 128 on one core
_MAX_EXPONENT = 80.0  # exp(-80) is still a normal float32


def sampled_softmax(
    hidden_ME: torch.Tensor,
    rows_UE: torch.Tensor,
    target_row_M: torch.Tensor,
    target_item_M: torch.Tensor,
    negative_row_GN: torch.Tensor,
    negative_item_GN: torch.Tensor,
    group_offsets: tuple[int, ...] | None,
    temperature: float,
    *,
    is_real_M: torch.Tensor | None = None,
    rounds_operands: bool = False,
) -> torch.Tensor:
    """Sums the next-item loss: cosine / temperature against the target and the N negatives of the position's group.

    Positions [group_offsets[g], group_offsets[g + 1]) share group g; None: every position has its own (G = M). `*_row`
    point into the looked-up item rows, `*_item` are table indices; a negative that is the position's target (accidental
    hit) is masked. Uniform draws, so no log-Q term. arXiv:2506.03699, section 3.2; temperature 0.05 from its official
    settings, and from those of HSTU (arXiv:2402.17152), which draws per position. `rounds_operands`: the two products
    that give gradients have operands in bfloat16; logits never do. `is_real_M`: bool, False for padding (shared sets).
    """
    # A cosine over a temperature of 0.05 reaches 20, where neighbouring bf16 numbers are 0.125 apart: half precision
    # could not tell good negatives from the target.
    with torch.autocast(hidden_ME.device.type, enabled=False):
        # Normalised once per distinct row, before the same row is gathered for many positions.
        unit_UE, query_ME = unit(rows_UE), unit(hidden_ME) / temperature
        indices = (target_row_M, target_item_M, negative_row_GN, negative_item_GN)
        if group_offsets is None:
            return _OwnNegativesSoftmax.apply(query_ME, unit_UE, indices)
        # Times 0, so that padding gives no row a gradient.
        query_ME = query_ME if is_real_M is None else query_ME * is_real_M[:, None]
        options = (group_offsets, 1 / temperature, rounds_operands, is_real_M)
        return _SampledSoftmax.apply(query_ME, unit_UE, indices, *options)


class _SampledSoftmax(torch.autograd.Function):
    """Computes the gradients in forward, in place of the [m, N] logits of one group: 2.5x faster than autograd at
    N = 4096 and half its memory, because the logits exist once, for one group at a time.

    No logit exceeds `bound` (a cosine over the temperature), so subtracting it replaces the search for the maximum
    of every position; only where exp(-2 bound) would underflow is the maximum looked up.
    """

    @staticmethod
    def forward(ctx, query_ME, unit_UE, indices, group_offsets, bound, rounds_operands, is_real_M=None):
        target_row_M, target_item_M, negative_row_GN, negative_item_GN = indices
        grad_query, grad_unit = torch.empty_like(query_ME), torch.zeros_like(unit_UE)
        loss, shift = query_ME.new_zeros(()), query_ME.new_full((), -bound)
        for group, (start, stop) in enumerate(itertools.pairwise(group_offsets)):
            query, target_row, negative_row = query_ME[start:stop], target_row_M[start:stop], negative_row_GN[group]
            target, negative = unit_UE.index_select(0, target_row), unit_UE.index_select(0, negative_row)
            positive = (query * target).sum(-1) - bound
            logits = torch.addmm(shift, query, negative.t())
            _mask_hits(logits, target_item_M[start:stop], negative_item_GN[group])
            if 2 * bound > _MAX_EXPONENT:
                largest = torch.maximum(logits.amax(-1), positive)
                positive, logits = positive - largest, logits.sub_(largest[:, None])
            # In place: the logits are the largest tensor here, and are not needed any more.
            weight, positive_weight = logits.exp_(), positive.exp()
            total = weight.sum(-1) + positive_weight
            loss_m = total.log() - positive
            loss += (loss_m if is_real_M is None else torch.where(is_real_M[start:stop], loss_m, 0.0)).sum()
            # d loss / d logit is the softmax weight, less 1 for the target. Dividing [m, E] results by the total, and
            # not the [m, N] weights, saves a pass over the largest tensor.
            scaled = query / total[:, None]
            residual = (positive_weight / total - 1)[:, None]
            weight, negative, scaled = (operand(side, rounds_operands) for side in (weight, negative, scaled))
            of_negatives = torch.mm(weight, negative).to(query.dtype)
            grad_query[start:stop] = of_negatives.div_(total[:, None]).addcmul_(residual, target)
            grad_unit.index_add_(0, target_row, residual * query)
            grad_unit.index_add_(0, negative_row, torch.mm(weight.t(), scaled).to(query.dtype))
        ctx.save_for_backward(grad_query, grad_unit)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return (*(grad * grad_loss for grad in ctx.saved_tensors), *[None] * 5)


class _OwnNegativesSoftmax(torch.autograd.Function):
    """Computes loss and gradients where every position has its own negatives, for one chunk of positions at a time.

    Rows [m, 1 + N, E] exist for one chunk only. Gradients are computed in forward, so that no chunk's rows have to be
    kept or looked up again.
    """

    @staticmethod
    def forward(ctx, query_ME, unit_UE, indices):
        target_row_M, target_item_M, negative_row_MN, negative_item_MN = indices
        grad_query, grad_unit = torch.empty_like(query_ME), torch.zeros_like(unit_UE)
        loss = query_ME.new_zeros(())
        size = max(1, CHUNK_ELEMENTS // ((1 + negative_row_MN.shape[1]) * unit_UE.shape[1]))
        for start in range(0, len(query_ME), size):
            part = slice(start, start + size)
            query_mE = query_ME[part]
            row_mN = torch.cat((target_row_M[part, None], negative_row_MN[part]), dim=1)  # the target comes first
            unit_mNE = unit_UE.index_select(0, row_mN.flatten()).unflatten(0, row_mN.shape)
            logits_mN = torch.bmm(unit_mNE, query_mE[:, :, None]).squeeze(-1)
            # A negative that is the target by chance would be pushed away and pulled closer at once.
            logits_mN[:, 1:].masked_fill_(negative_item_MN[part] == target_item_M[part, None], float("-inf"))
            log_weight_mN = logits_mN.log_softmax(-1)
            loss -= log_weight_mN[:, 0].sum()
            residual_mN = log_weight_mN.exp_()
            residual_mN[:, 0] -= 1
            grad_query[part] = torch.bmm(residual_mN[:, None], unit_mNE).squeeze(1)
            outer_mNE = torch.bmm(residual_mN[:, :, None], query_mE[:, None])
            # Added and not assigned: a row is the target of one position and a negative of others.
            grad_unit.index_add_(0, row_mN.flatten(), outer_mNE.flatten(0, 1))
        ctx.save_for_backward(grad_query, grad_unit)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return (*(grad * grad_loss for grad in ctx.saved_tensors), None)


def _mask_hits(logits_MN: torch.Tensor, target_M: torch.Tensor, negative_N: torch.Tensor) -> None:
    """Sets a logit to -inf, in place, where the negative is the position's target."""
    # The search for hits has a result of data-dependent size, for which the host would wait on a GPU: there, all M x N
    # pairs are compared. On a CPU that costs more than the search.
    if logits_MN.is_cuda or torch.compiler.is_compiling():
        logits_MN.masked_fill_(target_M[:, None] == negative_N, float("-inf"))
    else:
        sorted_N, order_N = negative_N.sort()
        first = torch.searchsorted(sorted_N, target_M)
        count = torch.searchsorted(sorted_N, target_M, right=True) - first
        position = torch.repeat_interleave(count)
        nth = torch.arange(len(position)) - (count.cumsum(0) - count)[position]
        logits_MN[position, order_N[first[position] + nth]] = float("-inf")


def full_softmax(
    hidden_ME: torch.Tensor, weight_VE: torch.Tensor, target_M: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sums the cosine softmax loss over all rows of a small table (category loss); target int64 rows, -100 for none."""
    with torch.autocast(hidden_ME.device.type, enabled=False):
        logits_MV = unit(hidden_ME) @ unit(weight_VE).t() / temperature
        return F.cross_entropy(logits_MV, target_M, reduction="sum")


def binary_cross_entropy(
    logit_C: torch.Tensor, label_C: torch.Tensor, weight_C: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums weight x cross entropy over candidates with an observed label (not NaN): float32 []. None: weights of 1."""
    return _masked_cross_entropy(F.logsigmoid(logit_C), F.logsigmoid(-logit_C), label_C, weight_C)


def observed(label_C: torch.Tensor, weight_C: torch.Tensor | None = None) -> torch.Tensor:
    """Counts the observed labels (not NaN), or sums their weights: []."""
    is_observed = ~label_C.isnan()
    return is_observed.sum() if weight_C is None else torch.where(is_observed, weight_C, 0.0).sum()


def sampled_logit(logit_C: torch.Tensor, negative_rate_C: torch.Tensor) -> torch.Tensor:
    """Turns a logit of the whole log into that of a log that kept the share `negative_rate_C` of its negatives.

    Sampling divides the odds of a positive's label by the rate (He et al., ADKDD'14, section 6.3, inverted).
    """
    return logit_C - negative_rate_C.log()


def conditional_label(label_C: torch.Tensor, given_C: torch.Tensor) -> torch.Tensor:
    """Gives the label of a task given another: not observed (NaN) unless the other label is 1."""
    return torch.where(given_C == 1, label_C, torch.nan)


def product_label(label_C: torch.Tensor, given_C: torch.Tensor) -> torch.Tensor:
    """Gives the label of both events: 0 where the first did not happen, whatever the second says; NaN if unknown."""
    return torch.where(given_C == 0, 0.0, torch.where(given_C == 1, label_C, torch.nan))


def product_cross_entropy(
    given_logit_C: torch.Tensor, logit_C: torch.Tensor, label_C: torch.Tensor, weight_C: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums ESMM's cross entropy of P(given) P(task | given) against the product label. arXiv:1804.07931, eq. 1, 3."""
    log_yes = F.logsigmoid(given_logit_C) + F.logsigmoid(logit_C)
    # 1 - ab = (1 - a) + a (1 - b), in logs: nothing cancels where ab is close to 1.
    log_no = torch.logaddexp(F.logsigmoid(-given_logit_C), F.logsigmoid(given_logit_C) + F.logsigmoid(-logit_C))
    return _masked_cross_entropy(log_yes, log_no, label_C, weight_C)


def _masked_cross_entropy(
    log_yes_C: torch.Tensor, log_no_C: torch.Tensor, label_C: torch.Tensor, weight_C: torch.Tensor | None
) -> torch.Tensor:
    # Replaced and not only masked out: the gradient of NaN times zero is NaN.
    is_observed = ~label_C.isnan()
    label = torch.where(is_observed, label_C, 0.0)
    loss = -(label * log_yes_C + (1 - label) * log_no_C)
    return torch.where(is_observed, loss if weight_C is None else loss * weight_C, 0.0).sum()
