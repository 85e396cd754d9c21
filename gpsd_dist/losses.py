"""Losses. Each returns local (sum, count); the trainer divides by the count over all ranks, so that the result does
not depend on how rows fell on ranks.

Shape letters: M next-item positions, G negative groups, N negatives per group, E embedding width, C candidates.
"""

import torch
import torch.nn.functional as F

LossSum = tuple[torch.Tensor, torch.Tensor]
"""(sum float32 [], count float32 [])"""


def sampled_softmax(
    hidden_ME: torch.Tensor,
    rows_UE: torch.Tensor,
    target_row_M: torch.Tensor,
    target_item_M: torch.Tensor,
    negative_row_GN: torch.Tensor,
    negative_item_GN: torch.Tensor,
    group_offsets: tuple[int, ...],
    temperature: float,
) -> LossSum:
    """Next-item loss: cosine / temperature against the target and the N negatives of the position's group.

    Positions [group_offsets[g], group_offsets[g + 1]) share group g. `*_row` point into the looked-up item rows,
    `*_item` are table indices; a negative that is the position's target (accidental hit) is masked. Uniform draws,
    so no log-Q term. arXiv:2506.03699, section 3.2; temperature 0.05 from its official settings.
    """
    unit_UE = F.normalize(rows_UE.float(), dim=-1)
    query_ME = F.normalize(hidden_ME.float(), dim=-1) / temperature
    target_ME = unit_UE.index_select(0, target_row_M)
    negative_GNE = unit_UE.index_select(0, negative_row_GN.flatten()).unflatten(0, negative_row_GN.shape)
    loss = _SampledSoftmax.apply(query_ME, target_ME, negative_GNE, target_item_M, negative_item_GN, group_offsets)
    return loss, loss.new_tensor(float(len(target_row_M)))


class _SampledSoftmax(torch.autograd.Function):
    """Gradients are computed in forward, in place of the [m, N] logits of one group: 2.5x faster than autograd at
    N = 4096 and half its memory, because the logits exist once, for one group at a time."""

    @staticmethod
    def forward(ctx, query_ME, target_ME, negative_GNE, target_item_M, negative_item_GN, group_offsets):
        grad_query = torch.empty_like(query_ME)
        grad_target = torch.empty_like(target_ME)
        grad_negative = torch.empty_like(negative_GNE)
        loss = query_ME.new_zeros(())
        for group, (start, stop) in enumerate(zip(group_offsets, group_offsets[1:], strict=False)):
            query, target, negative = query_ME[start:stop], target_ME[start:stop], negative_GNE[group]
            positive = (query * target).sum(-1)
            logits = query @ negative.t()
            logits[_accidental_hits(target_item_M[start:stop], negative_item_GN[group])] = float("-inf")
            log_total = torch.logaddexp(logits.logsumexp(-1), positive)
            loss += (log_total - positive).sum()
            probability = logits.sub_(log_total[:, None]).exp_()
            residual = ((positive - log_total).exp_() - 1)[:, None]
            grad_query[start:stop] = torch.addmm(residual * target, probability, negative)
            grad_target[start:stop] = residual * query
            torch.mm(probability.t(), query, out=grad_negative[group])
        ctx.save_for_backward(grad_query, grad_target, grad_negative)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return (*(grad * grad_loss for grad in ctx.saved_tensors), None, None, None)


def _accidental_hits(target_M: torch.Tensor, negative_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(position, negative) pairs that name the same item, by sorting N ids instead of comparing M x N."""
    sorted_N, order_N = negative_N.sort()
    first = torch.searchsorted(sorted_N, target_M)
    count = torch.searchsorted(sorted_N, target_M, right=True) - first
    position = torch.repeat_interleave(count)
    nth = torch.arange(len(position), device=position.device) - (count.cumsum(0) - count)[position]
    return position, order_N[first[position] + nth]


def full_softmax(hidden_ME: torch.Tensor, weight_VE: torch.Tensor, target_M: torch.Tensor, temperature: float) -> LossSum:
    """The same cosine softmax over all rows of a small table (category loss); target int64 table indices."""
    logits_MV = F.normalize(hidden_ME.float(), dim=-1) @ F.normalize(weight_VE.float(), dim=-1).t() / temperature
    loss = F.cross_entropy(logits_MV, target_M, reduction="sum")
    return loss, loss.new_tensor(float(len(target_M)))


def binary_cross_entropy(logit_C: torch.Tensor, label_C: torch.Tensor) -> LossSum:
    """Over candidates with an observed label (not NaN)."""
    return _masked_cross_entropy(F.logsigmoid(logit_C), F.logsigmoid(-logit_C), label_C)


def conditional_label(label_C: torch.Tensor, given_C: torch.Tensor) -> torch.Tensor:
    """Label of a task given another: not observed (NaN) unless the other label is 1."""
    return torch.where(given_C == 1, label_C, torch.nan)


def product_label(label_C: torch.Tensor, given_C: torch.Tensor) -> torch.Tensor:
    """Label of both events: 0 where the first did not happen, whatever the second says; NaN where unknown."""
    return torch.where(given_C == 0, 0.0, torch.where(given_C == 1, label_C, torch.nan))


def product_cross_entropy(given_logit_C: torch.Tensor, logit_C: torch.Tensor, label_C: torch.Tensor) -> LossSum:
    """ESMM: cross entropy of P(given) P(task | given) against the product label. arXiv:1804.07931, eq. 1 and 3."""
    log_yes = F.logsigmoid(given_logit_C) + F.logsigmoid(logit_C)
    # 1 - ab = (1 - a) + a (1 - b), in logs: no cancellation where ab is close to 1
    log_no = torch.logaddexp(F.logsigmoid(-given_logit_C), F.logsigmoid(given_logit_C) + F.logsigmoid(-logit_C))
    return _masked_cross_entropy(log_yes, log_no, label_C)


def _masked_cross_entropy(log_yes_C: torch.Tensor, log_no_C: torch.Tensor, label_C: torch.Tensor) -> LossSum:
    is_observed = ~label_C.isnan()
    label = torch.where(is_observed, label_C, 0.0)
    loss = -(label * log_yes_C + (1 - label) * log_no_C)
    return torch.where(is_observed, loss, 0.0).sum(), is_observed.sum().float()
