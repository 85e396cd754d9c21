import math

import pytest
import torch

from gpsd_dist.stages import losses

NAN = math.nan


def same(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


# label of the task given the first event; label of the first event -> conditional label, label of both events
TRUTH = [
    (0.0, 0.0, NAN, 0.0),
    (1.0, 0.0, NAN, 0.0),  # a contradiction: the first event did not happen, so neither did both
    (NAN, 0.0, NAN, 0.0),  # not bought because not clicked, although nobody wrote it down
    (0.0, 1.0, 0.0, 0.0),
    (1.0, 1.0, 1.0, 1.0),
    (NAN, 1.0, NAN, NAN),
    (0.0, NAN, NAN, NAN),
    (1.0, NAN, NAN, NAN),
    (NAN, NAN, NAN, NAN),
]


@pytest.mark.parametrize(("label", "given", "conditional", "product"), TRUTH)
def test_labels_of_a_task_given_another(label, given, conditional, product):
    label_C, given_C = torch.tensor([label]), torch.tensor([given])
    same(losses.conditional_label(label_C, given_C), [conditional])
    same(losses.product_label(label_C, given_C), [product])


@pytest.mark.parametrize("label", [[], [NAN], [NAN, NAN]], ids=str)
@pytest.mark.parametrize("esmm", [False, True])
def test_nothing_observed_gives_zero_and_no_gradient(label, esmm):
    logit, given = (torch.full((len(label),), 3.0, requires_grad=True) for _ in range(2))
    label_C = torch.tensor(label)
    loss = losses.product_cross_entropy(given, logit, label_C) if esmm else losses.binary_cross_entropy(logit, label_C)
    assert loss.item() == 0.0
    [gradient] = torch.autograd.grad(loss, logit)
    assert (gradient == 0).all()


@pytest.mark.parametrize("logit", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("label", [0.0, 1.0, NAN])
def test_binary_cross_entropy_at_extreme_logits(logit, label):
    logit_C = torch.tensor([logit], requires_grad=True)
    loss = losses.binary_cross_entropy(logit_C, torch.tensor([label]))
    is_wrong = (logit > 0) != (label == 1) and not math.isnan(label)
    assert loss.item() == pytest.approx(abs(logit) if is_wrong else 0.0)
    [gradient] = torch.autograd.grad(loss, logit_C)
    assert gradient.item() == pytest.approx(math.copysign(1.0, logit) if is_wrong else 0.0)


def test_losses_of_half_precision_inputs_are_computed_in_float32():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=random).bfloat16()
    table = torch.randn(6, 8, generator=random)
    loss = losses.full_softmax(hidden, table, torch.tensor([0, 1, 2, 3]), 0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses.full_softmax(hidden.float(), table, torch.tensor([0, 1, 2, 3]), 0.05))


def test_scale_of_hidden_states_and_rows_does_not_matter():
    """Cosine similarity: only directions count."""
    random = torch.Generator().manual_seed(0)
    hidden, table = torch.randn(4, 8, generator=random), torch.randn(6, 8, generator=random)
    target, negative = torch.tensor([0, 1, 2, 3]), torch.tensor([[4, 5, 0]])
    arguments = (target, target, negative, negative, (0, 4), 0.05)
    expected = losses.sampled_softmax(hidden, table, *arguments)
    torch.testing.assert_close(losses.sampled_softmax(7 * hidden, 0.3 * table, *arguments), expected)
    expected = losses.full_softmax(hidden, table, target, 0.05)
    torch.testing.assert_close(losses.full_softmax(7 * hidden, 0.3 * table, target, 0.05), expected)


@pytest.mark.parametrize("row", [0, 1])
def test_a_zero_vector_gives_finite_losses_and_gradients(row):
    hidden, table = torch.ones(2, 4, requires_grad=True), torch.ones(3, 4).requires_grad_()
    with torch.no_grad():
        (hidden if row else table)[0] = 0
    loss = losses.sampled_softmax(
        hidden,
        table,
        torch.tensor([0, 1]),
        torch.tensor([2, 3]),
        torch.tensor([[2]]),
        torch.tensor([[4]]),
        (0, 2),
        0.05,
    )
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, table)))
