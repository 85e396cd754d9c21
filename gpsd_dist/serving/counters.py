"""Counts earlier events of items by raw id, as of any moment. Counters are of an artefact, and change without a model.

For data built with --rates they sum labels as well: the log-odds of an item's clicks on the days before a request.

    artefacts/ctr/counters.json                 {"file", "bytes", "sha256", "as_of_s", "source"}; replaced atomically
    artefacts/ctr/counters/<as of>-<hash>.safetensors

A request is counted as of its own time, or as of the newest event that the counters know, whichever is earlier: what an
older counter does not know yet makes it late, never empty.

Shape letters: I items, T distinct seconds, M pairs of a value and a second, N candidates, D pairs of an item and a day.
"""

import collections.abc
import logging
import pathlib
import secrets
import time
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from gpsd_dist.data.gather import one_chunk
from gpsd_dist.data.hashing import mix
from gpsd_dist.disk import writing
from gpsd_dist.features import id_of
from gpsd_dist.schema import Feature, Manifest
from gpsd_dist.serving.artefact import Artefact, ArtefactError, FileSum, read_json, sum_of
from gpsd_dist.serving.tables import read_tensors

log = logging.getLogger(__name__)
POINTER_NAME, FOLDER = "counters.json", "counters"
_EVENTS, _ITEMS, _AS_OF = "events.parquet", "items.parquet", b"as_of_s"  # as `data_pipeline.counters` writes them
_DAYS, _CLICKS, _OTHERS, _DAY_S = "rates.parquet", "clicks", "others", 86_400
_ITEM, _NO_SLOT = "item_id", -1
_SAME_LOG_SHARE = 0.5  # of one log nearly all agree, but for what came late; of two logs nearly none
_MOST_COMPARED = 100_000  # seconds
_PARTIAL = ".partial-"


class Counters:
    """Gives the number of events before a moment, of an item or of one of its attributes. Immutable."""

    def __init__(self, arrays: collections.abc.Mapping[str, np.ndarray], as_of_s: int, source: str = ""):
        """`source`: that of the manifest of the data that they were made of."""
        self._arrays, self.as_of_s, self.source = arrays, as_of_s, source

    @property
    def as_of(self) -> str:
        """Words the end of these counters."""
        return f"{np.datetime64(self.as_of_s, 's')}Z"

    def age_s(self, time_s_B: np.ndarray) -> np.ndarray:
        """Returns how long before each request the counters end: int64 [B] seconds, 0 where they reach it."""
        return np.maximum(time_s_B - self.as_of_s, 0)

    def count(
        self, feature: Feature, id_N: np.ndarray, time_s_N: np.ndarray, value_N: np.ndarray | None = None
    ) -> np.ndarray:
        """Counts as `feature` says, for items by id (`features.id_of`), strictly before a second each: float32 [N].

        Of a feature with `prior_exposures` it computes the smoothed log-odds of earlier days.

        `value_N`: ids of the values of the counted attribute, for items that the counters know nothing of.
        """
        if feature.prior_exposures:
            return self._log_odds(feature.prior_exposures, id_N, time_s_N)
        a, name = self._arrays, feature.counts
        time_T, code_M = a["time_s"], a[f"{name}.code"]
        slot_N = np.append(a[f"{name}.slot"], _NO_SLOT)[_places(a["id"], id_N)]
        if value_N is not None and f"{name}.value" in a:  # older files lack it
            slot_N = np.where(slot_N == _NO_SLOT, _places(a[f"{name}.value"], value_N), slot_N)
        until_N, first_N = np.minimum(time_s_N, self.as_of_s), slot_N * (len(time_T) + 1)
        from_N = np.searchsorted(time_T, until_N - feature.window_s) if feature.window_s else 0
        begin_N = np.searchsorted(code_M, first_N + from_N)
        end_N = np.searchsorted(code_M, first_N + np.searchsorted(time_T, until_N))
        sum_M = a[f"{name}.num_timed" if feature.window_s else f"{name}.num"]  # of the pairs before each: [M + 1]
        return np.where(slot_N == _NO_SLOT, 0, sum_M[end_N] - sum_M[begin_N]).astype(np.float32)

    def _log_odds(self, weight: int, id_N: np.ndarray, time_s_N: np.ndarray) -> np.ndarray:
        """Smooths rates as `data_pipeline.counters` does: float32 [N]."""
        a, time_T = self._arrays, self._arrays["time_s"]
        rank_N = np.searchsorted(time_T, np.minimum(time_s_N // _DAY_S * _DAY_S, self.as_of_s))
        first_N = _places(a["id"], id_N) * (len(time_T) + 1)  # of an item that is not there, before every code
        begin_N, end_N = (np.searchsorted(a["rates.code"], code_N) for code_N in (first_N, first_N + rank_N))
        clicks_N, others_N = (a[f"rates.{part}"][end_N] - a[f"rates.{part}"][begin_N] for part in (_CLICKS, _OTHERS))
        all_N = a["rates.all_clicks"][rank_N]
        rate_N = (all_N + 1) / (all_N + a["rates.all_others"][rank_N] + 2)
        return np.log((clicks_N + weight * rate_N) / (others_N + weight * (1 - rate_N))).astype(np.float32)

    def first_s(self) -> int:
        """Returns the first second with an event; the end of the counters if there is none."""
        return int(self._arrays["time_s"][0]) if len(self._arrays["time_s"]) else self.as_of_s

    def events_of(self, item_feature: str, from_s: int, until_s: int) -> np.ndarray:
        """Lists the events of items within some seconds, the latest: a hash of item, second and number each."""
        a = self._arrays
        first, end = np.searchsorted(a["time_s"], (from_s, until_s))
        slot_M, rank_M = np.divmod(a[f"{item_feature}.code"], len(a["time_s"]) + 1)
        found = np.flatnonzero((rank_M >= max(first, end - _MOST_COMPARED)) & (rank_M < end))
        num = np.diff(a[f"{item_feature}.num"])[found]
        return mix(mix(a["id"][slot_M[found]] + a["time_s"][rank_M[found]]) + num)


def _places(sorted_V: np.ndarray, wanted_N: np.ndarray) -> np.ndarray:
    """Finds values in a sorted array: int64 [N], -1 for one that is not there."""
    if not len(sorted_V):
        return np.full(len(wanted_N), -1, np.int64)
    place_N = np.minimum(np.searchsorted(sorted_V, wanted_N), len(sorted_V) - 1)
    return np.where(sorted_V[place_N] == wanted_N, place_N, -1)


def needs(manifest: Manifest) -> bool:
    """Says whether the data set has features that count."""
    return bool(_counted(manifest))


def _counted(manifest: Manifest) -> set[str]:
    """Lists the features whose values are counted."""
    return {feature.counts for feature in manifest.features if feature.counts is not None}


def _has_rates(manifest: Manifest) -> bool:
    return any(feature.prior_exposures for feature in manifest.features)


def check_covers(manifest: Manifest, data: object, served: Artefact) -> None:
    """Raises ValueError if counters of a data set would not serve a version that counts."""
    wanted = _counted(served.manifest)
    other = [
        f"{name} {there!r} there, {here!r} here"
        for name in ("source", "item_feature")
        if (here := getattr(manifest, name)) != (there := getattr(served.manifest, name))
    ]
    if wanted and other:
        raise ValueError(
            f"{served.folder} counts events of another data set than {data} ({', '.join(other)}): use data of the same "
            "log, or another artefact"
        )
    if missing := sorted(wanted - _counted(manifest)):
        absent = sorted(set(missing) - {feature.name for feature in manifest.features})
        fix = f"its items have no {', '.join(absent)}; add that to the log, and " if absent else ""
        raise ValueError(
            f"{served.folder} counts events by {missing}, which {data} does not count: {fix}build it with --counts"
        )
    if _has_rates(served.manifest) and not _has_rates(manifest):
        raise ValueError(f"{served.folder} reads rates of labels, which {data} does not have: build it with --rates 20")


def check_same_log(root: pathlib.Path, manifest: Manifest, made: Counters) -> None:
    """Raises ValueError if new counters are of another log than those of an artefact; broken ones there are none.

    A log is known by its events: two of one source share next to none of the time that both know.
    """
    try:
        held = open_counters(root, manifest)
    except ArtefactError:
        return
    if held is None:
        return
    span = max(held.first_s(), made.first_s()), min(held.as_of_s, made.as_of_s)
    there, here = (found.events_of(manifest.item_feature, *span) for found in (held, made))
    num_alike, num_both = len(np.intersect1d(there, here)), min(len(there), len(here))
    if num_alike < _SAME_LOG_SHARE * num_both:
        raise ValueError(
            f"{root} has counters of another log: of {num_both:,} events of items in the time that both know, "
            f"{num_alike:,} are the same; use data of the same log, or another artefact (counters that are wrong give "
            "way to python -m gpsd_dist.counters --accept_older)"
        )


def from_data(data_dir: pathlib.Path, manifest: Manifest) -> Counters:
    """Makes counters of the events of a data set. ValueError where it has none, or two ids share their 60 bits."""
    folder = data_dir / FOLDER
    if not needs(manifest) or not (folder / _EVENTS).is_file():
        raise ValueError(f"{data_dir} has no counters; build it with --counts 7d,30d,total")
    events, items, *days = (pq.read_table(folder / name) for name in (_EVENTS, _ITEMS, *[_DAYS] * _has_rates(manifest)))
    raw = pc.unique(pa.chunked_array([c for part in (items, events, *days) for c in part[_ITEM].chunks], pa.string()))
    known_I, place_R = _sorted_ids(raw)
    item_E = place_R[pc.index_in(one_chunk(events[_ITEM]), raw).to_numpy()]
    described_X = place_R[pc.index_in(one_chunk(items[_ITEM]), raw).to_numpy()]
    moments = [part["moment_s"].to_numpy() for part in (events, *days)]
    time_T, rank = np.unique(np.concatenate(moments), return_inverse=True)
    rank_E = rank[: len(events)]
    arrays = {"id": known_I, "time_s": time_T}
    for name in sorted(_counted(manifest)):
        slot_I = np.arange(len(known_I))
        if name != manifest.item_feature:
            slot_I = np.full(len(known_I), _NO_SLOT)
            values = one_chunk(items[name]).dictionary_encode()
            arrays[f"{name}.value"], place_W = _sorted_ids(values.dictionary)
            code_X = pc.fill_null(values.indices, len(place_W)).to_numpy()
            slot_I[described_X] = np.append(place_W, _NO_SLOT)[code_X]
        arrays |= {
            f"{name}.{part}": array for part, array in _pairs(slot_I, item_E, rank_E, len(time_T), events).items()
        }
    for table in days:
        item_D, rank_D = place_R[pc.index_in(one_chunk(table[_ITEM]), raw).to_numpy()], rank[len(events) :]
        parts = _pairs(np.arange(len(known_I)), item_D, rank_D, len(time_T), table, (_CLICKS, _OTHERS))
        for part in (_CLICKS, _OTHERS):
            parts[f"all_{part}"] = np.append(0, np.cumsum(np.bincount(rank_D, table[part].to_numpy(), len(time_T))))
        arrays |= {f"rates.{part}": array for part, array in parts.items()}
    return Counters(arrays, int(events.schema.metadata[_AS_OF]), manifest.source)


def _sorted_ids(raw: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Hashes different ids or values: (sorted ids, place of each among them). ValueError where two have one id."""
    id_R = id_of(raw)
    order = np.argsort(id_R, kind="stable")
    sorted_R = id_R[order]
    if len(same := np.flatnonzero(sorted_R[1:] == sorted_R[:-1])):
        pair = raw.take(pa.array(order[same[0] : same[0] + 2])).to_pylist()
        raise ValueError(f"{pair} have one id, as 60 bits of md5; expected different ids: rename one of them")
    return sorted_R, np.argsort(order)


def _pairs(
    slot_I: np.ndarray,
    item_E: np.ndarray,
    rank_E: np.ndarray,
    num_times: int,
    events: pa.Table,
    parts: tuple[str, ...] = ("num", "num_timed"),
) -> dict[str, np.ndarray]:
    """Sums the events of each value and second: the arrays of one feature, sums of the type of their column."""
    is_counted_E = slot_I[item_E] != _NO_SLOT
    code_E = (slot_I[item_E] * (num_times + 1) + rank_E)[is_counted_E]
    code_M, pair_E = np.unique(code_E, return_inverse=True)
    sums = {"slot": slot_I.astype(np.int64), "code": code_M}
    for part in parts:
        number_E = events[part].to_numpy()
        number_M = np.bincount(pair_E, number_E[is_counted_E], len(code_M)).astype(number_E.dtype)
        sums[part] = np.append(0, np.cumsum(number_M)).astype(number_E.dtype)
    return sums


def newer_than(root: pathlib.Path, counters: Counters) -> bool:
    """Says whether an artefact has newer counters of the same data set; broken ones are none."""
    entry = _pointer(root)
    as_of_s, source = entry.get("as_of_s"), entry.get("source", counters.source)
    return type(as_of_s) is int and as_of_s > counters.as_of_s and source == counters.source


def publish(root: pathlib.Path, counters: Counters, accept_older: bool = False) -> bool:
    """Makes these the counters of an artefact, unless it has newer ones; returns whether it did.

    The file is there and whole before the pointer names it. That of before stays, since a server may be opening it.
    The caller has the lock (`artefact.locked`).
    """
    if newer_than(root, counters) and not accept_older:
        return False
    if counters.as_of_s - 1 > time.time():
        log.warning(
            "the log ends at %s, which is yet to come: counters of a mended log end earlier, and replace these only by "
            "python -m gpsd_dist.counters --accept_older",
            counters.as_of,
        )
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    for path in folder.glob(f"{_PARTIAL}*"):
        path.unlink()
    aside = folder / f"{_PARTIAL}{secrets.token_hex(8)}"
    save_file({name: np.ascontiguousarray(array) for name, array in counters._arrays.items()}, aside)
    aside.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files for their owner alone
    writing.sync(aside)
    made = sum_of(aside)
    target = folder / f"{counters.as_of_s:012d}-{made.sha256[:12]}.safetensors"
    aside.replace(target)
    writing.sync(folder)
    kept = {target.name, str(_pointer(root).get("file"))}
    entry = {"file": target.name, "bytes": made.num_bytes, "sha256": made.sha256}
    writing.write_json(root / POINTER_NAME, entry | {"as_of_s": counters.as_of_s, "source": counters.source})
    for path in folder.glob("*.safetensors"):
        if path.name not in kept:
            path.unlink()
    return True


def _pointer(root: pathlib.Path) -> dict[str, typing.Any]:
    """Reads what names the counters of an artefact; empty if it is missing or broken."""
    try:
        return read_json(root / POINTER_NAME)
    except ArtefactError:
        return {}


def open_counters(root: pathlib.Path, manifest: Manifest) -> Counters | None:
    """Maps the counters of an artefact; None where no feature counts. ArtefactError if they are missing or damaged."""
    if not needs(manifest):
        return None
    place = root / POINTER_NAME
    entry = read_json(place)
    name, as_of_s = entry.get("file"), entry.get("as_of_s")
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or type(as_of_s) is not int:
        raise ArtefactError(f"{place} names no counters; make them anew: python -m gpsd_dist.counters")
    if (source := entry.get("source", manifest.source)) != manifest.source:
        given = f"{place} names counters of {source!r}, and the model is of {manifest.source!r}"
        raise ArtefactError(f"{given}; make them of the model's data: python -m gpsd_dist.counters")
    path = root / FOLDER / name
    if sum_of(path) != FileSum(entry.get("bytes"), entry.get("sha256")):
        raise ArtefactError(f"{path} is not what was written; make it anew: python -m gpsd_dist.counters")
    arrays = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    parts = ("slot", "code", "num", "num_timed")
    wanted = {f"{name}.{part}" for name in _counted(manifest) for part in parts}
    wanted |= {"rates.code"} if _has_rates(manifest) else set()
    if missing := sorted((wanted | {"id", "time_s"}) - arrays.keys()):
        raise ArtefactError(f"{path} lacks {missing}; make it of data that count them: python -m gpsd_dist.counters")
    return Counters(arrays, as_of_s, manifest.source)
