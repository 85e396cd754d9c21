"""The hand-written gradients of the losses against autograd on a reference with explicit masks."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist.data.negatives import Mixed
from gpsd_dist.stages import item_score, losses
from gpsd_dist.stages.next_behaviour import next_behaviour
from tests.helpers import reference

NAN = math.nan
TEMPERATURE = 0.3


def make_problem(num_positions, num_groups, num_negatives, *, num_items=9, width=5, seed=0, group_offsets=None):
    """Few items, so that negatives repeat and hit targets. Row r of the lookup holds item 2 + permuted r."""
    random = torch.Generator().manual_seed(seed)
    item_U = torch.randperm(num_items, generator=random) + 2
    row_of = {int(item): row for row, item in enumerate(item_U)}

    def draw(*shape):
        items = torch.randint(2, 2 + num_items, shape, generator=random)
        return items, torch.tensor([row_of[int(i)] for i in items.flatten()], dtype=torch.int64).view(shape)

    target_item, target_row = draw(num_positions)
    negative_item, negative_row = draw(num_groups, num_negatives)
    if group_offsets is None:
        group_offsets = tuple(np.linspace(0, num_positions, num_groups + 1).astype(int).tolist())
    return {
        "hidden": torch.randn(num_positions, width, generator=random),
        "rows": torch.randn(num_items, width, generator=random),
        "target_row": target_row,
        "target_item": target_item,
        "negative_row": negative_row,
        "negative_item": negative_item,
        "group_offsets": group_offsets,
    }


def run_ours(p, hidden, rows):
    indices = (p["target_row"], p["target_item"], p["negative_row"], p["negative_item"])
    return losses.sampled_softmax(hidden, rows, *indices, p["group_offsets"], TEMPERATURE)


def run_reference(p, hidden, rows):
    group_M = np.repeat(np.arange(len(p["group_offsets"]) - 1), np.diff(p["group_offsets"]))
    indices = (p["target_row"], p["target_item"], p["negative_row"], p["negative_item"])
    return reference.sampled_softmax(hidden, rows, *indices, group_M, TEMPERATURE)


PROBLEMS = {
    "one group": {"num_positions": 7, "num_groups": 1, "num_negatives": 20},
    "8 groups": {"num_positions": 21, "num_groups": 8, "num_negatives": 6},
    "more groups than positions": {"num_positions": 3, "num_groups": 8, "num_negatives": 4},
    "per request, some empty": {
        "num_positions": 6,
        "num_groups": 5,
        "num_negatives": 4,
        "group_offsets": (0, 0, 1, 1, 6, 6),
    },
    "one negative": {"num_positions": 5, "num_groups": 2, "num_negatives": 1},
    "all negatives hit": {"num_positions": 4, "num_groups": 1, "num_negatives": 6, "num_items": 1},
    "no positions": {"num_positions": 0, "num_groups": 3, "num_negatives": 4},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_sampled_softmax_equals_masked_reference(name):
    """float32, because the loss computes in float32; the reference in float64. Sums of <= 21 terms: 1e-4 is ample."""
    p = make_problem(**PROBLEMS[name])
    leaves = [p["hidden"].requires_grad_(), p["rows"].requires_grad_()]
    loss = run_ours(p, *leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = run_reference(p, *exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    if PROBLEMS[name]["num_positions"]:
        got, wanted = torch.autograd.grad(3.0 * loss, leaves), torch.autograd.grad(3.0 * expected, exact)
        for ours, theirs in zip(got, wanted):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["one group", "all negatives hit", "no positions"])
def test_hits_found_by_search_are_those_found_by_comparison(name):
    """CPU searches, CUDA compares."""
    p = make_problem(**PROBLEMS[name])
    target, negative = p["target_item"], p["negative_item"][0]
    masked = torch.zeros(len(target), len(negative))
    losses._mask_hits(masked, target, negative)
    assert torch.equal(masked == -math.inf, target[:, None] == negative)


def test_vectors_shorter_than_a_millionth_are_divided_by_that():
    """As in the official code; a zero vector would else have a gradient that clipping turns into a stop of the rest."""
    p = make_problem(**PROBLEMS["one group"])
    with torch.no_grad():
        p["hidden"][0], p["hidden"][1] = 0, p["hidden"][1] * 1e-8
        p["rows"][p["target_row"][0]] = 0
    leaves = [p["hidden"].requires_grad_(), p["rows"].requires_grad_()]
    got = torch.autograd.grad(run_ours(p, *leaves), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    units = [x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6) for x in exact]
    scores = units[0] @ units[1].T / TEMPERATURE
    logits = torch.cat((scores.gather(1, p["target_row"][:, None]), scores[:, p["negative_row"][0]]), dim=1)
    logits[:, 1:][p["negative_item"] == p["target_item"][:, None]] = -math.inf
    expected = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")
    wanted = torch.autograd.grad(expected, exact)
    for ours, theirs in zip(got, wanted):
        assert (theirs.norm(dim=-1) > 1e3).any()  # 1e6 times what others have, and not 1e12 times
        error = (ours.double() - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-3)
        assert error.max() < 1e-4
    torch.testing.assert_close(
        losses.unit(torch.tensor([[3e-7, 4e-7], [3.0, 4.0]])), torch.tensor([[0.3, 0.4], [0.6, 0.8]])
    )


def test_autocast_leaves_losses_in_float32():
    """A cosine over 0.05 reaches 20, where bf16 has a step of 0.125."""
    p = make_problem(**PROBLEMS["8 groups"])
    for offsets in (p["group_offsets"], None):
        problem = p | {"group_offsets": offsets}
        if offsets is None:
            problem |= make_problem(**OWN["some positions"]) | {"group_offsets": None}
        hidden, rows = problem["hidden"].requires_grad_(), problem["rows"].requires_grad_()
        found = []
        for is_on in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                loss = run_ours(problem, hidden, rows)
            found.append((loss, *torch.autograd.grad(loss, (hidden, rows))))
        assert all(torch.equal(plain, under_autocast) for plain, under_autocast in zip(*found))


OWN = {
    "some positions": {"num_positions": 11, "num_groups": 11, "num_negatives": 8},
    "one negative": {"num_positions": 5, "num_groups": 5, "num_negatives": 1},
    "all negatives hit": {"num_positions": 4, "num_groups": 4, "num_negatives": 6, "num_items": 1},
    "no positions": {"num_positions": 0, "num_groups": 0, "num_negatives": 4},
}


@pytest.mark.parametrize("chunk_elements", [1, 4 * 9 * 5, 1 << 21])  # one, four, all positions at a time
@pytest.mark.parametrize("name", OWN)
def test_negatives_per_position_equal_the_masked_reference(name, chunk_elements, monkeypatch):
    """Tolerances as above."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_elements)
    p = make_problem(**OWN[name])
    leaves = [p["hidden"].requires_grad_(), p["rows"].requires_grad_()]
    loss = run_ours(p | {"group_offsets": None}, *leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = run_reference(p | {"group_offsets": range(OWN[name]["num_positions"] + 1)}, *exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    if OWN[name]["num_positions"]:
        got, wanted = torch.autograd.grad(3.0 * loss, leaves), torch.autograd.grad(3.0 * expected, exact)
        for ours, theirs in zip(got, wanted):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_gradients_of_own_negatives_in_float64():
    p = make_problem(**OWN["some positions"])
    indices = (p["target_row"], p["target_item"], p["negative_row"], p["negative_item"])
    assert (p["negative_item"] == p["target_item"][:, None]).any()
    query, rows = (2.0 * p["hidden"].double()).requires_grad_(), p["rows"].double().requires_grad_()
    loss = losses._OwnNegativesSoftmax.apply
    assert torch.autograd.gradcheck(lambda q, r: loss(q, r, indices), (query, rows), fast_mode=True)


def test_problems_hold_hits_and_duplicates():
    p = make_problem(**PROBLEMS["8 groups"])
    hits = sum(
        int((p["negative_item"][g] == p["target_item"][m]).sum())
        for g in range(8)
        for m in range(p["group_offsets"][g], p["group_offsets"][g + 1])
    )
    assert hits >= 5 and any(len(set(group.tolist())) < 6 for group in p["negative_item"])


@pytest.mark.parametrize("bound", [20.0, 100.0], ids=["fixed shift", "shift by the maximum"])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "no positions"])
def test_gradients_of_the_autograd_function_in_float64(name, bound):
    p = make_problem(**PROBLEMS[name])
    query = (2.0 * p["hidden"].double()).requires_grad_()
    rows = p["rows"].double().requires_grad_()
    indices = (p["target_row"], p["target_item"], p["negative_row"], p["negative_item"])

    def loss(query, rows):
        return losses._SampledSoftmax.apply(query, rows, indices, p["group_offsets"], bound, False)

    assert torch.autograd.gradcheck(loss, (query, rows), fast_mode=True)


def test_a_tiny_temperature_does_not_underflow():
    p = make_problem(**PROBLEMS["8 groups"])
    indices = (p["target_row"], p["target_item"], p["negative_row"], p["negative_item"], p["group_offsets"])
    loss = losses.sampled_softmax(p["hidden"], p["rows"], *indices, temperature=0.002)
    assert torch.isfinite(loss)


def test_a_position_whose_negatives_all_hit_costs_nothing():
    p = make_problem(**PROBLEMS["all negatives hit"])
    loss = run_ours(p, p["hidden"].requires_grad_(), p["rows"])
    loss.backward()
    assert abs(loss.item()) < 1e-6 and p["hidden"].grad.abs().max() < 1e-6


@settings(max_examples=50, deadline=None)
@given(
    target=st.lists(st.integers(2, 9), max_size=12),
    negative=st.lists(st.integers(2, 9), min_size=1, max_size=12),
)
def test_accidental_hits_are_all_equal_pairs(target, negative):
    target_M, negative_N = (torch.tensor(ids, dtype=torch.int64) for ids in (target, negative))
    masked = torch.zeros(len(target), len(negative))
    losses._mask_hits(masked, target_M, negative_N)
    expected = [[-math.inf if a == b else 0.0 for b in negative] for a in target]
    assert masked.tolist() == expected


def test_full_softmax_equals_reference():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=random).requires_grad_()
    weight = torch.randn(7, 5, generator=random).requires_grad_()
    target = torch.tensor([0, 6, 3, 3, 1, 2])
    loss = losses.full_softmax(hidden, weight, target, TEMPERATURE)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    cosine = torch.stack([torch.stack([h @ w / h.norm() / w.norm() for w in exact[1]]) for h in exact[0]])
    expected = -(cosine / TEMPERATURE).log_softmax(-1)[range(6), target].sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_product_cross_entropy_equals_direct_formula():
    """float64: log of a product of sigmoids, and log of one minus it."""
    a, b = torch.meshgrid(torch.linspace(-6, 6, 13), torch.linspace(-6, 6, 13), indexing="ij")
    given_logit, logit = (x.flatten().double().requires_grad_() for x in (a, b))
    label = (torch.arange(169) % 2).double()
    loss = losses.product_cross_entropy(given_logit, logit, label)
    probability = torch.sigmoid(given_logit) * torch.sigmoid(logit)
    expected = -(label * probability.log() + (1 - label) * (1 - probability).log()).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    got, wanted = (torch.autograd.grad(value, (given_logit, logit)) for value in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given_logit", [-200.0, -1e4, 200.0, 1e4])
@pytest.mark.parametrize("logit", [-200.0, -1e4, 200.0, 1e4])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_product_cross_entropy_is_stable_at_extreme_logits(given_logit, logit, label):
    logits = [torch.tensor([value], requires_grad=True) for value in (given_logit, logit)]
    loss = losses.product_cross_entropy(*logits, torch.tensor([label]))
    # -log(ab): what falls short of 0. -log(1 - ab): with both probabilities at 1, 1 - ab = e^-x + e^-y.
    yes = sum(max(-value, 0.0) for value in (given_logit, logit))
    low, both_sure = min(given_logit, logit), min(given_logit, logit) > 0
    no = low - (math.log(2) if given_logit == logit else 0.0) if both_sure else 0.0
    assert loss.item() == pytest.approx(yes if label else no, rel=1e-6, abs=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, logits))


def test_binary_cross_entropy_equals_torch_and_skips_unobserved():
    random = torch.Generator().manual_seed(0)
    logit = torch.randn(8, generator=random).requires_grad_()
    label = torch.tensor([0.0, 1.0, NAN, 1.0, NAN, 0.0, 0.0, 1.0])
    is_observed = ~label.isnan()
    loss = losses.binary_cross_entropy(logit, label)
    expected = F.binary_cross_entropy_with_logits(logit[is_observed], label[is_observed], reduction="sum")
    torch.testing.assert_close(loss, expected)
    [ours], [theirs] = torch.autograd.grad(loss, logit), torch.autograd.grad(expected, logit)
    torch.testing.assert_close(ours, theirs)
    assert (ours[~is_observed] == 0).all()


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 12), seed=st.integers(0, 100))
def test_sums_do_not_depend_on_how_rows_are_split(cut, seed):
    random = torch.Generator().manual_seed(seed)
    logit, given_logit = torch.randn(2, 12, generator=random, dtype=torch.float64)
    label = torch.tensor([0.0, 1.0, NAN, 1.0] * 3, dtype=torch.float64)
    hidden, weight = torch.randn(12, 4, generator=random), torch.randn(6, 4, generator=random)
    target = torch.randint(6, (12,), generator=random)
    whole = slice(0, 12)
    for run in (
        lambda part: losses.binary_cross_entropy(logit[part], label[part]),
        lambda part: losses.product_cross_entropy(given_logit[part], logit[part], label[part]),
        lambda part: losses.full_softmax(hidden[part], weight, target[part], TEMPERATURE),
    ):
        parts = [run(part) for part in (slice(0, cut), slice(cut, 12))]
        torch.testing.assert_close(sum(parts), run(whole))


def test_sampled_softmax_sums_do_not_depend_on_how_positions_are_split():
    p = make_problem(12, 1, 10)
    whole = run_ours(p, p["hidden"], p["rows"])
    total = torch.zeros(())
    for part in (slice(0, 5), slice(5, 5), slice(5, 12)):
        piece = p | {key: p[key][part] for key in ("target_row", "target_item")}
        piece["group_offsets"] = (0, len(piece["target_row"]))
        total = total + run_ours(piece, p["hidden"][part], p["rows"])
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("lengths", [[4, 1, 3], [1, 1], [0], [2]], ids=str)
def test_next_behaviour_compares_each_state_with_the_next_token_and_another(lengths):
    """The auxiliary loss of DIEN, position by position."""
    random = torch.Generator().manual_seed(0)
    num_tokens = sum(lengths)
    state, token = (torch.randn(num_tokens, 5, generator=random).requires_grad_() for _ in range(2))
    item = torch.randint(3, (num_tokens,), generator=random)  # few items: some negatives are the item itself
    negative = torch.randint(max(num_tokens, 1), (num_tokens,), generator=random)
    position = torch.tensor([i for length in lengths for i in range(length)], dtype=torch.int64)
    expected, count, hits = torch.zeros(()), 0, 0
    for t in range(num_tokens):
        if position[t] == 0:
            continue
        expected = expected - torch.sigmoid(state[t - 1] @ token[t]).log()
        is_hit = item[negative[t]] == item[t]
        expected = expected if is_hit else expected - (1 - torch.sigmoid(state[t - 1] @ token[negative[t]])).log()
        count, hits = count + 1, hits + int(is_hit)
    total = next_behaviour(state, token, position, item, negative)
    assert hits > 0 or lengths != [4, 1, 3]
    torch.testing.assert_close(total, expected)
    if count:
        wanted = torch.autograd.grad(expected, (state, token))
        for ours, theirs in zip(torch.autograd.grad(total, (state, token)), wanted):
            torch.testing.assert_close(ours, theirs)


def run_with_offsets(p, hidden, rows, bias, log_q, per_position):
    """Offsets that differ by position and item: what counts of recent events are."""

    def of_negatives(part, item, group):
        return (per_position[part, None] * bias[item] - log_q[group]).float()

    indices = (p["target_row"], p["target_item"], p["negative_row"], p["negative_item"])
    target = (per_position * bias[p["target_item"]]).float()
    return item_score.offset_softmax(target, of_negatives, hidden, rows, *indices, p["group_offsets"], TEMPERATURE)


@pytest.mark.parametrize("own", [False, True], ids=["groups", "own negatives"])
@pytest.mark.parametrize("chunk", [1, losses.CHUNK_ELEMENTS])
def test_offsets_are_added_to_the_logits(own, chunk, monkeypatch):
    monkeypatch.setattr(item_score, "CHUNK_ELEMENTS", chunk)
    p = make_problem(21, 21 if own else 8, 6)
    p["group_offsets"] = None if own else p["group_offsets"]
    bias, log_q, per = torch.randn(11), torch.randn(p["negative_item"].shape), torch.rand(21)
    leaves = [p["hidden"].requires_grad_(), p["rows"].requires_grad_(), bias.requires_grad_()]
    loss = run_with_offsets(p, *leaves, log_q, per)
    loss.backward()
    hidden, rows, added = (leaf.detach().double().requires_grad_() for leaf in leaves)
    group_M = np.arange(21) if own else np.repeat(np.arange(8), np.diff(p["group_offsets"]))
    expected = 0
    for m, g in enumerate(group_M):
        scores = [F.cosine_similarity(hidden[m], rows[r], dim=0) for r in (p["target_row"][m], *p["negative_row"][g])]
        items = [p["target_item"][m], *p["negative_item"][g]]
        logits = torch.stack([s / TEMPERATURE + per[m] * added[i] for s, i in zip(scores, items, strict=True)])
        logits = logits - torch.cat((torch.zeros(1), log_q[g]))
        is_hit = torch.tensor([False, *(i == items[0] for i in items[1:])])
        expected = expected - logits.masked_fill(is_hit, -math.inf).log_softmax(0)[0]
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for leaf, exact in zip(leaves, (hidden, rows, added), strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_own_negatives_with_offsets_keep_no_row_for_each_of_them():
    p = make_problem(21, 21, 6) | {"group_offsets": None}
    leaves = [p["hidden"].requires_grad_(), p["rows"].requires_grad_(), torch.randn(11).requires_grad_()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        run_with_offsets(p, *leaves, torch.randn(p["negative_item"].shape), torch.rand(21))
    assert max(kept) < p["negative_item"].numel() * p["hidden"].shape[1]


@pytest.mark.parametrize("group_offsets", [None, (0,), (0, 0, 0)], ids=["own negatives", "no request", "groups"])
def test_without_positions_every_parameter_gets_a_gradient_of_zero(group_offsets):
    p = make_problem(0, 0 if group_offsets is None else len(group_offsets) - 1, 6) | {"group_offsets": group_offsets}
    leaves = [p["hidden"].requires_grad_(), p["rows"].requires_grad_(), torch.randn(11).requires_grad_()]
    run_with_offsets(p, *leaves, torch.zeros(p["negative_item"].shape), torch.rand(0)).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_corrected_draws_sum_to_the_full_softmax_on_average(share):
    """By arithmetic: every way to draw 3 negatives of 4 items, weighed by its probability."""
    mixed = Mixed(share, np.array([5, 3, 8, 0, 1, 3]))
    probability = (1 - share) / 4 + share * np.array([8, 0, 1, 3]) / 12
    random = torch.Generator().manual_seed(0)
    hidden, rows = torch.randn(1, 5, generator=random), torch.randn(4, 5, generator=random)
    logits = F.cosine_similarity(hidden, rows).double() / TEMPERATURE
    target = 2
    average = 0.0
    for draw in itertools.product(range(4), repeat=3):
        negative = torch.tensor([draw])
        log_q = torch.from_numpy(mixed.log_q((negative + 2).numpy()))
        indices = torch.tensor([target]), torch.tensor([target + 2]), negative, negative + 2
        loss = item_score.offset_softmax(
            torch.zeros(1),
            lambda part, item, group, log_q=log_q: -log_q[group],
            hidden,
            rows,
            *indices,
            (0, 1),
            TEMPERATURE,
        )
        average += np.prod(probability[list(draw)]) * math.exp(float(loss) + float(logits[target]))
    assert average == pytest.approx(float(logits.exp().sum()), rel=1e-5)
