"""Draws the synthetic shop: latent interests, and behaviour and exposure logs from them. Writes no file.

Items sit in niches inside topics, with a noisy category and brand and a Zipf popularity; users hold a few weighted
interests (niches) that drift from week to week. They browse in sessions, which gives a long behaviour log; then they
are shown requests of a few items, click those that fit their interests, and sometimes buy what they clicked. The
exposures are few per item, so that an item table trained on clicks alone overfits, while the behaviour log tells
which items belong together. Constants are untuned guesses but `_CLICK` and the defaults of `SyntheticConfig`, which
were set so that the true probabilities score a click AUC of 0.80 - 0.85 and smoothed click rates one of about 0.60.
"""

import dataclasses
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DAY_S = 86_400
WEEK_S = 7 * DAY_S
USERS_PER_BLOCK = 50_000  # 0.66 GB at most while blocks of 45 events per user are drawn and written
START_TIME_S = 1_704_067_200  # 2024-01-01 00:00 UTC, a Monday
EVENT_TYPES = ("view", "cart", "buy")
TABS = ("home", "search", "similar", "sale")

_TAB_SHARE = np.array([0.5, 0.2, 0.2, 0.1])
_TAB_BIAS = np.array([0.0, 0.5, 0.1, -0.4])
_SLOT_BIAS = -0.18  # logit per slot further down
_CLICK = {"intercept": -3.1, "match": 4.6, "topic": 0.8, "quality": 0.5, "user": 0.4}
_BUY = {"intercept": -2.9, "match": 1.6, "quality": 0.4, "user": 0.5, "price": -0.4}
_SAME_TOPIC_HOP = 0.1  # share of browsing events that leave the niche of the session for a sibling in the topic
_OWN_INTEREST = 0.85  # share of sessions that follow an interest of the user; the rest browse anywhere
_CANDIDATE_SHARE = np.array([0.35, 0.15, 0.5])  # of a request: own interest, own topic, popular items


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Sets the sizes of the data set. The defaults are those of the quickstart (minutes on two CPU cores)."""

    num_users: int = 12_000
    num_items: int = 8_000
    num_topics: int = 24
    niches_per_topic: int = 16
    num_brands: int = 300
    zipf_exponent: float = 0.9
    """Popularity of the item of rank r is proportional to r to minus this."""
    attribute_noise: float = 0.3
    """Share of items whose category (and, drawn apart, brand) says nothing about their topic."""
    num_interests: int = 3
    drift_per_week: float = 0.15
    """Chance that an interest is replaced from one week to the next."""
    events_per_user: float = 45.0
    """Mean length of the behaviour log of a user; the spread is log-normal."""
    events_per_session: float = 4.0
    history_days: int = 28
    """Behaviour only; then the exposures start. Behaviour goes on until the end."""
    train_days: int = 5
    valid_days: int = 1
    test_days: int = 1
    requests_per_day: int = 4_000
    candidates_per_request: int = 4
    max_history_length: int = 40
    """Goes into schema.toml: how much of a history the prepared data keep."""
    min_count: int = 1
    """Goes into schema.toml: items seen less often in training become unknown."""
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low, high = {"seed": (0, 2**63 - 1), "attribute_noise": (0, 1), "drift_per_week": (0, 1)}.get(
                field.name, (1, 1e9)
            )
            low = 0 if field.name == "zipf_exponent" else low
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"synthetic option {field.name} is {value!r}, expected a number in [{low}, {high:g}]")
            if field.type is int and not isinstance(value, int):
                raise ValueError(f"synthetic option {field.name} is {value!r}, expected a whole number")
        if self.num_items < 4 * self.num_niches:
            raise ValueError(
                f"num_items {self.num_items} is less than 4 per niche ({self.num_topics} topics x "
                f"{self.niches_per_topic} niches); use more items or fewer num_topics or niches_per_topic"
            )

    @property
    def num_niches(self) -> int:
        """Counts the niches over all topics; niche n belongs to topic n // niches_per_topic."""
        return self.num_topics * self.niches_per_topic

    @property
    def num_days(self) -> int:
        """Counts the days from the first behaviour to the last exposure."""
        return self.history_days + self.train_days + self.valid_days + self.test_days

    @property
    def boundaries_s(self) -> tuple[int, int, int, int]:
        """Lists the epoch seconds at which train, valid and test exposures start, and the end of the log."""
        days = np.cumsum([self.history_days, self.train_days, self.valid_days, self.test_days])
        train_s, valid_s, test_s, end_s = (START_TIME_S + int(day) * DAY_S for day in days)
        return train_s, valid_s, test_s, end_s


class Items(typing.NamedTuple):
    """Holds arrays over items, ordered by niche so that a niche is a slice."""

    niche: np.ndarray
    category: np.ndarray
    brand: np.ndarray
    price: np.ndarray
    popularity: np.ndarray  # sums to 1
    quality: np.ndarray  # standard normal; moves clicks and purchases


class Users(typing.NamedTuple):
    """Holds arrays over users."""

    interest: np.ndarray  # [users, weeks, interests] niche
    weight: np.ndarray  # [users, interests], sums to 1 over interests
    activity: np.ndarray  # relative rate of sessions and requests, mean 1
    bias: np.ndarray  # standard normal; how willingly the user clicks
    age_group: np.ndarray
    region: np.ndarray


class BlockStart(typing.NamedTuple):
    """Says where a block of users lies in the whole data set."""

    user: int  # number of its first user
    request: int  # number of its first request
    requests_per_day: int


class SyntheticLog(typing.NamedTuple):
    """Holds the tables that are written, and the truth that is not."""

    behaviours: pa.Table
    exposures: pa.Table
    items: pa.Table
    users: pa.Table
    click_probability: np.ndarray  # per exposure row
    buy_probability: np.ndarray  # per exposure row, given a click


def synthesize(config: SyntheticConfig) -> SyntheticLog:
    """Draws the whole data set in memory. Equal configs give equal tables."""
    (log,) = blocks(config, config.num_users)
    return log


def blocks(config: SyntheticConfig, users_per_block: int = USERS_PER_BLOCK) -> typing.Iterator[SyntheticLog]:
    """Yields the data set in blocks of users over the same items, one in memory at a time. Equal configs, equal tables.

    Behaviours and exposures ascend in time within a block. A data set of one block is that of `synthesize`.
    """
    items = _draw_items(config, np.random.default_rng([config.seed, 0]))
    niche_share: np.ndarray | None = None
    for block, first in enumerate(range(0, config.num_users, users_per_block)):
        last = min(first + users_per_block, config.num_users)
        first_request, last_request = (config.requests_per_day * place // config.num_users for place in (first, last))
        part = dataclasses.replace(config, num_users=last - first)
        num_days = config.train_days + config.valid_days + config.test_days
        start = BlockStart(first, first_request * num_days, last_request - first_request)
        place = [block] if block else []  # so neither a stage nor a block shifts the draws of another
        rngs = [np.random.default_rng([config.seed, stage, *place]) for stage in range(1, 5)]
        if niche_share is None:  # niches differ in popularity
            niche_share = rngs[0].dirichlet(np.full(config.num_niches, 3.0))
        users = _draw_users(part, niche_share, rngs[0])
        behaviours = _draw_behaviours(part, items, users, start, rngs[1])
        exposures, click_probability, buy_probability = _draw_exposures(part, items, users, start, rngs[2], rngs[3])
        tables = behaviours, exposures, _items_table(items), _users_table(users, start)
        yield SyntheticLog(*tables, click_probability, buy_probability)


def _draw_items(config: SyntheticConfig, rng: np.random.Generator) -> Items:
    n = config.num_items
    niche = np.sort(np.arange(n) % config.num_niches)  # every niche gets its share
    topic = niche // config.niches_per_topic
    quality = rng.normal(size=n)
    popularity = np.empty(n)
    popularity[np.argsort(-(quality + rng.normal(size=n)))] = np.arange(1, n + 1) ** -float(config.zipf_exponent)
    noise = rng.random((2, n)) < config.attribute_noise
    category = np.where(noise[0], rng.integers(0, config.num_topics, n), topic)
    brands_per_topic = max(1, config.num_brands // config.num_topics)
    own_brand = (topic * brands_per_topic + rng.integers(0, brands_per_topic, n)) % config.num_brands
    brand = np.where(noise[1], rng.integers(0, config.num_brands, n), own_brand)
    price = np.round(np.exp(rng.normal(3.0, 0.8, n) + rng.normal(0, 0.5, config.num_topics)[topic]), 2)
    return Items(niche, category, brand, price, popularity / popularity.sum(), quality)


def _draw_users(config: SyntheticConfig, niche_share: np.ndarray, rng: np.random.Generator) -> Users:
    n, k, num_weeks = config.num_users, config.num_interests, -(-config.num_days // 7)
    interest = np.empty((n, num_weeks, k), np.int64)
    interest[:, 0] = rng.choice(config.num_niches, (n, k), p=niche_share)
    for week in range(1, num_weeks):
        moves = rng.random((n, k)) < config.drift_per_week
        near = _sibling(config, interest[:, week - 1], rng)
        far = rng.choice(config.num_niches, (n, k), p=niche_share)
        interest[:, week] = np.where(moves, np.where(rng.random((n, k)) < 0.5, near, far), interest[:, week - 1])
    activity = rng.lognormal(-0.32, 0.8, n)  # mean exp(-0.32 + 0.8^2 / 2) = 1
    weight = rng.dirichlet(np.full(k, 4.0), n)
    return Users(interest, weight, activity, rng.normal(size=n), rng.integers(0, 7, n), rng.integers(0, 30, n))


def _draw_behaviours(
    config: SyntheticConfig, items: Items, users: Users, start: BlockStart, rng: np.random.Generator
) -> pa.Table:
    """Draws sessions of a few events about one niche, over all days."""
    rate = users.activity * config.events_per_user / config.events_per_session
    sessions_per_user = rng.poisson(rate) + 1  # everybody came at least once
    session_user = np.repeat(np.arange(config.num_users), sessions_per_user)
    start_s = _request_times(rng, rng.integers(0, config.num_days, len(session_user)))
    follows = rng.random(len(session_user)) < _OWN_INTEREST
    anywhere = items.niche[rng.choice(config.num_items, len(session_user), p=items.popularity)]
    session_niche = np.where(follows, _pick_interest(users, session_user, start_s, rng), anywhere)

    length = rng.geometric(1 / config.events_per_session, len(session_user)) if config.events_per_session > 1 else 1
    session = np.repeat(np.arange(len(session_user)), length)
    gap_s = 1 + rng.exponential(60.0, len(session)).astype(np.int64)
    first = np.flatnonzero(np.diff(session, prepend=-1))
    total = np.cumsum(gap_s)
    time_s = start_s[session] + total - np.repeat(total[first], np.diff(np.append(first, len(session))))
    niche = session_niche[session]
    niche = np.where(rng.random(len(session)) < _SAME_TOPIC_HOP, _sibling(config, niche, rng), niche)
    item = _item_of_niche(items, niche, rng)
    event = rng.choice(len(EVENT_TYPES), len(session), p=[0.9, 0.07, 0.03])

    order = np.lexsort((np.arange(len(session)), time_s))
    user = session_user[session]
    keep = order[time_s[order] < config.boundaries_s[-1]]  # a session may run past the last midnight
    return pa.table(
        {
            "user": _ids("u", user[keep] + start.user),
            "item": _ids("i", item[keep]),
            "event": pa.DictionaryArray.from_arrays(event[keep].astype(np.int8), list(EVENT_TYPES)).cast(pa.string()),
            "time_s": time_s[keep],
        }
    )


def _draw_exposures(
    config: SyntheticConfig,
    items: Items,
    users: Users,
    start: BlockStart,
    rng: np.random.Generator,
    labels: np.random.Generator,
):
    """Draws requests of `candidates_per_request` items: returns (table with labels, click and buy probability)."""
    num_days = config.train_days + config.valid_days + config.test_days
    day = config.history_days + np.repeat(np.arange(num_days), start.requests_per_day)
    start_s = np.sort(_request_times(rng, day))
    user_R = rng.choice(config.num_users, len(start_s), p=users.activity / users.activity.sum())
    tab_R = rng.choice(len(TABS), len(start_s), p=_TAB_SHARE)
    request = np.repeat(np.arange(len(start_s)), config.candidates_per_request)
    user, time_s, tab = user_R[request], start_s[request], tab_R[request]
    slot = np.tile(np.arange(config.candidates_per_request), len(start_s))

    own = _pick_interest(users, user, time_s, rng)
    way = rng.choice(3, len(request), p=_CANDIDATE_SHARE)
    anywhere = rng.choice(config.num_items, len(request), p=items.popularity)
    item = np.where(way == 2, anywhere, _item_of_niche(items, np.where(way == 1, _sibling(config, own, rng), own), rng))

    interest = users.interest[user, (time_s - START_TIME_S) // WEEK_S]
    same_niche = (interest == items.niche[item][:, None]) * users.weight[user]
    same_topic = (
        interest // config.niches_per_topic == (items.niche[item] // config.niches_per_topic)[:, None]
    ) * users.weight[user]
    match = np.sqrt(same_niche.sum(1))  # a minor interest still counts
    near = np.sqrt(same_topic.sum(1)) - match
    fit, quality, bias = _CLICK["match"] * match + _CLICK["topic"] * near, items.quality[item], users.bias[user]
    click_logit = _CLICK["intercept"] + fit + _CLICK["quality"] * quality + _CLICK["user"] * bias
    click_probability = _sigmoid(click_logit + _TAB_BIAS[tab] + _SLOT_BIAS * slot)
    dear = np.log(items.price[item]) - 3.0
    buy_logit = (
        _BUY["intercept"]
        + _BUY["match"] * match
        + _BUY["quality"] * quality
        + _BUY["user"] * bias
        + _BUY["price"] * dear
    )
    buy_probability = _sigmoid(buy_logit)
    click = (labels.random(len(request)) < click_probability).astype(np.int8)
    buy = click * (labels.random(len(request)) < buy_probability).astype(np.int8)
    table = pa.table(
        {
            "request": _ids("r", request + start.request),
            "user": _ids("u", user + start.user),
            "item": _ids("i", item),
            "time_s": time_s,
            "tab": pa.DictionaryArray.from_arrays(tab.astype(np.int8), list(TABS)).cast(pa.string()),
            "slot": slot,
            "click": click,
            "buy": buy,
        }
    )
    return table, click_probability, buy_probability


def _items_table(items: Items) -> pa.Table:
    category, brand = _ids("c", items.category), _ids("b", items.brand)
    return pa.table(
        {"item": _ids("i", np.arange(len(items.niche))), "category": category, "brand": brand, "price": items.price}
    )


def _users_table(users: Users, start: BlockStart) -> pa.Table:
    age, region = _ids("age", users.age_group), _ids("region", users.region)
    activity = np.round(np.log(users.activity), 3).astype(np.float32)
    user = _ids("u", start.user + np.arange(len(age)))
    return pa.table({"user": user, "age_group": age, "region": region, "activity": activity})


def _pick_interest(users: Users, user: np.ndarray, time_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one niche per entry of `user` from the interests the user has in that week."""
    which = (rng.random((len(user), 1)) > np.cumsum(users.weight[user], 1)[:, :-1]).sum(1)
    return users.interest[user, (time_s - START_TIME_S) // WEEK_S, which]


def _sibling(config: SyntheticConfig, niche: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws another niche of the same topic (or the same one, by chance)."""
    return niche // config.niches_per_topic * config.niches_per_topic + rng.integers(
        0, config.niches_per_topic, niche.shape
    )


def _item_of_niche(items: Items, niche: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one item per entry of `niche`, by popularity inside the niche."""
    total = np.append(0.0, np.cumsum(items.popularity))
    first, last = np.searchsorted(items.niche, niche, "left"), np.searchsorted(items.niche, niche, "right")
    draw = total[first] + rng.random(len(niche)) * (total[last] - total[first])
    return np.clip(np.searchsorted(total, draw, "right") - 1, first, last - 1)


def _request_times(rng: np.random.Generator, day: np.ndarray) -> np.ndarray:
    """Draws a second of the day for every entry of `day`, most of them in the evening."""
    second = np.clip(rng.normal(19.5, 3.5, len(day)) * 3600, 0, None)
    second = np.where((rng.random(len(day)) < 0.4) | (second >= DAY_S), rng.random(len(day)) * DAY_S, second)
    return START_TIME_S + day * DAY_S + second.astype(np.int64)


def _ids(prefix: str, number: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(number).cast(pa.string()), "")


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))
