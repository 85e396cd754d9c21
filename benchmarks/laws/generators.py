"""Draws small logs whose clicks follow one law each, with the probability of every label.

A law is frozen once it has been run: figures of today must be comparable with those of next year. Another difficulty is
another law. `tests/unit/benchmarks/test_laws.py` holds a digest of each.

Every user has one request of K candidates, so that users of train, valid and test are apart. `probabilities` are those
that the labels are drawn from; their AUC is the ceiling of every model. `explicit` numbers what somebody who knows the
law would count rates by; these rates, counted on train, come near the ceiling, so the law can be learnt from the log.

Shape letters: U users, H events of a history, K candidates of a request, I items.
"""

import collections.abc
import dataclasses

import numpy as np

HIGH, LOW = 0.55, 0.05  # click probabilities where a law has two
START_S, DAY_S = 1_700_006_400, 86_400  # 2023-11-15T00:00:00, so that the hour of a time is that of the day
NUM_HISTORY_DAYS, NUM_TRAIN_DAYS = 5, 2  # requests follow on two days of train, one of valid and one of test


@dataclasses.dataclass(frozen=True)
class Users:
    """Holds what is drawn before the law: how many users there are, and when their requests are."""

    random: np.random.Generator
    time_s_U: np.ndarray
    num_candidates: int

    @property
    def shape_UK(self) -> tuple[int, int]:
        return len(self.time_s_U), self.num_candidates

    @property
    def is_after_train_U(self) -> np.ndarray:
        return self.time_s_U >= START_S + (NUM_HISTORY_DAYS + NUM_TRAIN_DAYS) * DAY_S


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """Holds a log and what it was drawn from. Features are categories where they are integers, else numbers."""

    history_UH: np.ndarray
    """Item of each event, oldest first; -1: no event (at the end)."""
    shown_UK: np.ndarray
    probabilities: dict[str, np.ndarray]
    """Task -> probability of label 1, [U, K]; of a task after the first: given that the one before is 1."""
    explicit_UK: np.ndarray
    """Number of the class of the last task's explicit feature, from 0."""
    item_features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    user_features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    context_features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    candidate_features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def draw(law: str, num_users: int, num_candidates: int, seed: int) -> tuple[Log, Users]:
    """Draws the log of one of LAWS. ValueError for another name."""
    if law not in LAWS:
        raise ValueError(f"there is no law {law!r}; choose some of {list(LAWS)}")
    random = np.random.default_rng((seed, *law.encode()))
    day_U = NUM_HISTORY_DAYS + random.integers(4, size=num_users)
    users = Users(random, START_S + day_U * DAY_S + random.integers(DAY_S, size=num_users), num_candidates)
    return LAWS[law](users), users


def draw_labels(log: Log, users: Users) -> dict[str, np.ndarray]:
    """Draws 0 or 1 for each task, [U, K]; one after the first is 0 where the one before is."""
    random = np.random.default_rng(users.random.integers(1 << 62))
    labels, before_UK = {}, np.array(True)
    for task, p_UK in log.probabilities.items():
        before_UK = (random.random(p_UK.shape) < p_UK) & before_UK
        labels[task] = before_UK.astype(int)
    return labels


def item_bias(users: Users, num_items: int = 200) -> Log:
    """Gives each item a rate of its own, which histories follow too. The category is noise."""
    bias_I = _sigmoid(users.random.normal(-1.2, 1.5, num_items))
    shown_UK = users.random.integers(num_items, size=users.shape_UK)
    return Log(
        history_UH=_weighted(users, bias_I),
        shown_UK=shown_UK,
        probabilities={"click": bias_I[shown_UK]},
        explicit_UK=shown_UK,
        item_features={"category": users.random.integers(20, size=num_items)},
    )


def item_attribute(users: Users, num_items: int = 4000, num_categories: int = 40) -> Log:
    """Gives each category a rate, which histories follow too; an item is shown too rarely to be known by itself."""
    category_I = np.arange(num_items) % num_categories
    bias_I = _sigmoid(users.random.normal(-1.2, 1.5, num_categories))[category_I]
    shown_UK = users.random.integers(num_items, size=users.shape_UK)
    return Log(
        history_UH=_weighted(users, bias_I),
        shown_UK=shown_UK,
        probabilities={"click": bias_I[shown_UK]},
        explicit_UK=category_I[shown_UK],
        item_features={"category": category_I},
    )


def match_category(users: Users, num_items: int = 600, num_categories: int = 30) -> Log:
    """Gives each user two favourite categories: nine in ten events are of them, and so are clicks."""
    liked_U2 = _distinct(users, num_categories, 2)
    event_UH = _either(
        users, 0.9, _one_of(users, liked_U2, 10), users.random.integers(num_categories, size=(len(liked_U2), 10))
    )
    shown_UK = _either(users, 0.3, _one_of(users, liked_U2), users.random.integers(num_categories, size=users.shape_UK))
    is_liked_UK = (shown_UK[:, :, None] == liked_U2[:, None]).any(2)
    return Log(
        history_UH=_item_of(users, event_UH, num_items, num_categories),
        shown_UK=_item_of(users, shown_UK, num_items, num_categories),
        probabilities={"click": np.where(is_liked_UK, 0.6, 0.04)},
        explicit_UK=_counts(event_UH, shown_UK),
        item_features={"category": np.arange(num_items) % num_categories},
    )


def match_item(users: Users, num_items: int = 300) -> Log:
    """Clicks what is in the history, item by item. Items have no attribute; a user comes back to four of them."""
    own_U4 = _distinct(users, num_items, 4)
    event_UH = _either(users, 0.8, _one_of(users, own_U4, 10), users.random.integers(num_items, size=(len(own_U4), 10)))
    shown_UK = _either(users, 0.3, _one_of(users, event_UH), users.random.integers(num_items, size=users.shape_UK))
    is_known_UK = _counts(event_UH, shown_UK) > 0
    return Log(
        history_UH=event_UH,
        shown_UK=shown_UK,
        probabilities={"click": np.where(is_known_UK, 0.6, 0.04)},
        explicit_UK=is_known_UK.astype(int),
    )


def recency(users: Users, num_items: int = 400, num_categories: int = 20) -> Log:
    """Clicks the category of the last event. Most other candidates are of earlier categories of the same user."""
    own_U5 = _distinct(users, num_categories, 5)
    event_UH = _one_of(users, own_U5, 10)
    for h in range(1, event_UH.shape[1]):  # users stay with a category
        event_UH[:, h] = _either(users, 0.4, event_UH[:, h - 1], event_UH[:, h])
    other_UK = _either(users, 0.7, _one_of(users, own_U5), users.random.integers(num_categories, size=users.shape_UK))
    shown_UK = _either(users, 0.25, event_UH[:, -1:], other_UK)
    is_last_UK = shown_UK == event_UH[:, -1:]
    return Log(
        history_UH=_item_of(users, event_UH, num_items, num_categories),
        shown_UK=_item_of(users, shown_UK, num_items, num_categories),
        probabilities={"click": np.where(is_last_UK, 0.6, 0.04)},
        explicit_UK=is_last_UK.astype(int),
        item_features={"category": np.arange(num_items) % num_categories},
    )


def order(users: Users, num_items: int = 320, num_categories: int = 16) -> Log:
    """Clicks the category that comes after that of the last event; six in ten events follow the same rule.

    Most other candidates come after an earlier event, so that the set of events says little.
    """
    next_C = _cycle(users, num_categories)
    event_UH = users.random.integers(num_categories, size=(users.shape_UK[0], 10))
    for h in range(1, event_UH.shape[1]):
        event_UH[:, h] = _either(users, 0.6, next_C[event_UH[:, h - 1]], event_UH[:, h])
    other_UK = users.random.integers(num_categories, size=users.shape_UK)
    shown_UK = _either(users, 0.6, next_C[_one_of(users, event_UH[:, :-1])], other_UK)
    shown_UK = _either(users, 0.3, next_C[event_UH[:, -1:]], shown_UK)
    return Log(
        history_UH=_item_of(users, event_UH, num_items, num_categories),
        shown_UK=_item_of(users, shown_UK, num_items, num_categories),
        probabilities={"click": np.where(shown_UK == next_C[event_UH[:, -1:]], 0.6, 0.04)},
        explicit_UK=event_UH[:, -1:] * num_categories + shown_UK,
        item_features={"category": np.arange(num_items) % num_categories},
    )


def count(users: Users, num_items: int = 400, num_categories: int = 20) -> Log:
    """Clicks a category of which the history has three events or more. Histories are 8 to 16 events long."""
    own_U6 = _distinct(users, num_categories, 6)
    heavy_UH, light_UH = _one_of(users, own_U6[:, :2], 16), _one_of(users, own_U6[:, 2:], 16)
    event_UH = _either(users, 0.5, heavy_UH, light_UH)
    event_UH[np.arange(16) >= users.random.integers(8, 17, size=(len(event_UH), 1))] = -1
    other_UK = _either(users, 0.75, _one_of(users, own_U6), users.random.integers(num_categories, size=users.shape_UK))
    shown_UK = _either(users, 0.15, _one_of(users, own_U6[:, :2]), other_UK)
    count_UK = _counts(event_UH, shown_UK)
    return Log(
        history_UH=_item_of(users, event_UH, num_items, num_categories),
        shown_UK=_item_of(users, shown_UK, num_items, num_categories),
        probabilities={"click": np.where(count_UK >= 3, 0.6, 0.04)},
        explicit_UK=count_UK,
        item_features={"category": np.arange(num_items) % num_categories},
    )


def user_item(users: Users, num_items: int = 600, num_categories: int = 20, num_groups: int = 8) -> Log:
    """Lets each group of users click its own six of twenty categories; the history is noise."""
    group_U = users.random.integers(num_groups, size=users.shape_UK[0])
    liked_GC = np.argsort(users.random.random((num_groups, num_categories)), axis=1) < 6
    shown_UK = users.random.integers(num_categories, size=users.shape_UK)
    return Log(
        history_UH=users.random.integers(num_items, size=(len(group_U), 10)),
        shown_UK=_item_of(users, shown_UK, num_items, num_categories),
        probabilities={"click": np.where(liked_GC[group_U[:, None], shown_UK], HIGH, LOW)},
        explicit_UK=group_U[:, None] * num_categories + shown_UK,
        item_features={"category": np.arange(num_items) % num_categories},
        user_features={"user_group": group_U},
    )


def threshold(users: Users, num_items: int = 6000) -> Log:
    """Clicks items cheaper than a bound: three in ten. Prices are lognormal; no item is shown often."""
    price_I = users.random.lognormal(3.0, 1.0, num_items)
    shown_UK = users.random.integers(num_items, size=users.shape_UK)
    price_UK = price_I[shown_UK]
    return Log(
        history_UH=users.random.integers(num_items, size=(users.shape_UK[0], 10)),
        shown_UK=shown_UK,
        probabilities={"click": np.where(price_UK < np.quantile(price_I, 0.3), HIGH, LOW)},
        explicit_UK=_bins(price_UK, 40),
        item_features={"price": price_I},
    )


def interval(users: Users, num_items: int = 200) -> Log:
    """Clicks where a number of the exposure lies inside an interval: too little is as bad as too much."""
    discount_UK = users.random.random(users.shape_UK)
    return Log(
        history_UH=users.random.integers(num_items, size=(users.shape_UK[0], 10)),
        shown_UK=users.random.integers(num_items, size=users.shape_UK),
        probabilities={"click": np.where(np.abs(discount_UK - 0.45) < 0.15, HIGH, LOW)},
        explicit_UK=_bins(discount_UK, 40),
        candidate_features={"discount": discount_UK},
    )


def time_of_day(users: Users, num_items: int = 360, num_categories: int = 12) -> Log:
    """Gives each category seven hours of the day in which it is clicked. The hour is a context feature."""
    hour_U = users.time_s_U % DAY_S // 3600
    shown_UK = users.random.integers(num_categories, size=users.shape_UK)
    from_peak_UK = (hour_U[:, None] - (24 // num_categories) * _cycle(users, num_categories)[shown_UK]) % 24
    return Log(
        history_UH=users.random.integers(num_items, size=(len(hour_U), 10)),
        shown_UK=_item_of(users, shown_UK, num_items, num_categories),
        probabilities={"click": np.where((from_peak_UK <= 3) | (from_peak_UK >= 21), HIGH, LOW)},
        explicit_UK=hour_U[:, None] * num_categories + shown_UK,
        item_features={"category": np.arange(num_items) % num_categories},
        context_features={"hour": hour_U},
    )


def new_item(users: Users, num_old: int = 600, num_new: int = 300) -> Log:
    """Shows items in valid and test that train and the histories never had; category and brand decide."""
    random, num_items = users.random, num_old + num_new
    category_I, brand_I = random.integers(20, size=num_items), random.integers(15, size=num_items)
    odds_I = random.normal(0, 1.2, 20)[category_I] + random.normal(0, 1.2, 15)[brand_I] - 1.5
    old_UK, new_UK = random.integers(num_old, size=users.shape_UK), random.integers(num_old, num_items, users.shape_UK)
    shown_UK = np.where(users.is_after_train_U[:, None], new_UK, old_UK)
    return Log(
        history_UH=_weighted(users, _sigmoid(odds_I[:num_old])),
        shown_UK=shown_UK,
        probabilities={"click": _sigmoid(odds_I)[shown_UK]},
        explicit_UK=(category_I * 15 + brand_I)[shown_UK],
        item_features={"category": category_I, "brand": brand_I},
    )


def conversion(users: Users, num_items: int = 900) -> Log:
    """Lets the category decide on the click, and the brand alone on the purchase after it."""
    category_I, brand_I = users.random.integers(20, size=num_items), users.random.integers(15, size=num_items)
    is_clicked_C, is_bought_B = users.random.permutation(20) < 8, users.random.permutation(15) < 6
    shown_UK = users.random.integers(num_items, size=users.shape_UK)
    click_UK = np.where(is_clicked_C[category_I], 0.6, 0.2)[shown_UK]
    return Log(
        history_UH=_weighted(users, np.where(is_clicked_C[category_I], 0.6, 0.2)),
        shown_UK=shown_UK,
        probabilities={"click": click_UK, "buy": np.where(is_bought_B[brand_I], 0.6, 0.06)[shown_UK]},
        explicit_UK=brand_I[shown_UK],
        item_features={"category": category_I, "brand": brand_I},
    )


def rare_feature(users: Users, num_items: int = 200) -> Log:
    """Lets one value of one feature decide, which 8 % of the rows have, beside twenty features of noise."""
    random = users.random
    promotion_UK = _either(users, 0.08, np.zeros(users.shape_UK, int), random.integers(1, 10, size=users.shape_UK))
    noise = {f"noise_{n}": random.integers(5 + 3 * n, size=users.shape_UK) for n in range(15)}
    noise |= {f"noise_{n}": random.normal(size=users.shape_UK) for n in range(15, 20)}
    return Log(
        history_UH=random.integers(num_items, size=(users.shape_UK[0], 10)),
        shown_UK=random.integers(num_items, size=users.shape_UK),
        probabilities={"click": np.where(promotion_UK == 0, 0.85, LOW)},
        explicit_UK=promotion_UK,
        candidate_features=noise | {"promotion": promotion_UK},
    )


LAWS: dict[str, collections.abc.Callable[[Users], Log]] = {
    law.__name__: law
    for law in (
        *(item_bias, item_attribute, match_category, match_item, recency, order, count, user_item),
        *(threshold, interval, time_of_day, new_item, conversion, rare_feature),
    )
}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _either(users: Users, share: float, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Takes each element of `first` with probability `share`, else of `second`, which has the shape."""
    return np.where(users.random.random(second.shape) < share, first, second)


def _distinct(users: Users, limit: int, number: int) -> np.ndarray:
    """Draws `number` distinct values below `limit` for each user, [U, number]."""
    return np.argsort(users.random.random((users.shape_UK[0], limit)), axis=1)[:, :number]


def _one_of(users: Users, own_UX: np.ndarray, number: int = 0) -> np.ndarray:
    """Draws `number` values (default K) among each user's own, with replacement."""
    shape = (len(own_UX), number or users.num_candidates)
    return np.take_along_axis(own_UX, users.random.integers(own_UX.shape[1], size=shape), axis=1)


def _item_of(users: Users, category: np.ndarray, num_items: int, num_categories: int) -> np.ndarray:
    """Draws an item of each category, where item i is of category i % num_categories; -1 stays."""
    item = category + num_categories * users.random.integers(num_items // num_categories, size=category.shape)
    return np.where(category < 0, -1, item)


def _weighted(users: Users, weight_I: np.ndarray) -> np.ndarray:
    """Draws histories of ten items with probabilities that follow the weights."""
    return users.random.choice(len(weight_I), size=(users.shape_UK[0], 10), p=weight_I / weight_I.sum())


def _cycle(users: Users, number: int) -> np.ndarray:
    """Draws a permutation that is one cycle: none follows itself."""
    ring = users.random.permutation(number)
    next_C = np.empty(number, int)
    next_C[ring] = np.roll(ring, -1)
    return next_C


def _counts(event_UH: np.ndarray, shown_UK: np.ndarray) -> np.ndarray:
    return (event_UH[:, None] == shown_UK[:, :, None]).sum(2)


def _bins(values: np.ndarray, number: int) -> np.ndarray:
    """Numbers bins with about equally many values."""
    return np.searchsorted(np.quantile(values, np.arange(1, number) / number), values)
