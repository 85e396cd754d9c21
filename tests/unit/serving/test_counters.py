"""Counters of an artefact against plain Python: any moment, windows, unknown items, newer files, a broken one."""

import dataclasses
import json
import math
import pathlib
import random
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist.counters.__main__ import main, refresh
from gpsd_dist.export import exporter
from gpsd_dist.features import id_of
from gpsd_dist.schema import Feature, Manifest, Table, Task, read_manifest, write_manifest
from gpsd_dist.serving import counters
from gpsd_dist.serving.artefact import ArtefactError, drafting, locked, make_current
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.requests import Limits, RequestReader
from gpsd_dist.serving.vocabulary import Vocabulary
from tests.helpers.artefacts import write_artefact

HOUR_S = 3600
CATEGORY = {"a": "x", "b": "x", "c": None, "new": "y"}  # d is in no file of items
PLACES = ("history", "candidate")
MANIFEST = Manifest(
    "s",
    (
        Feature("item", PLACES, table="item"),
        Feature("category", PLACES, table="category"),
        *(
            Feature(f"count_{window_s}_{name}", ("candidate",), "numerical", counts=name, window_s=window_s)
            for name in ("item", "category")
            for window_s in (0, HOUR_S)
        ),
    ),
    (Table("item", 9, "f"), Table("category", 9, "g")),
    (Task("click"),),
    (),
    5,
)
COUNTED = [feature for feature in MANIFEST.features if feature.counts is not None]


def write_data(folder: pathlib.Path, events: list[tuple[str, int, bool]]) -> pathlib.Path:
    """Writes what a build leaves for serving; an event is (item, epoch s, whether that is its own time)."""
    (folder / "counters").mkdir(parents=True)
    pairs = sorted({(item, s) for item, s, _ in events})
    own = [[is_timed for item, s, is_timed in events if (item, s) == pair] for pair in pairs]
    columns = {"item_id": [item for item, _ in pairs], "moment_s": [s for _, s in pairs]}
    columns |= {"num": [len(found) for found in own], "num_timed": [sum(found) for found in own]}
    as_of_s = 1 + max(s for _, s, _ in events)
    table = pa.table(columns).replace_schema_metadata({b"as_of_s": str(as_of_s).encode()})
    pq.write_table(table, folder / "counters" / "events.parquet")
    items = pa.table({"item_id": list(CATEGORY), "category": pa.array(CATEGORY.values(), pa.string())})
    pq.write_table(items, folder / "counters" / "items.parquet")
    return folder


def draw_events(seed: int) -> list[tuple[str, int, bool]]:
    draw = random.Random(seed)
    return [
        (draw.choice("abcd"), 1000 + HOUR_S * draw.randrange(9) + draw.randrange(2), draw.random() < 0.8)
        for _ in range(200)
    ]


def expected(events: list, feature: Feature, item: str, moment_s: int) -> int:
    def value(other: str) -> str | None:
        return other if feature.counts == "item" else CATEGORY.get(other)

    from_s = moment_s - feature.window_s if feature.window_s else 0
    return sum(
        from_s <= s < moment_s and value(other) == value(item) and value(item) is not None
        for other, s, is_timed in events
        if is_timed or not feature.window_s
    )


@pytest.mark.parametrize("feature", COUNTED, ids=lambda feature: feature.name)
def test_counts_of_every_moment_are_those_of_plain_python(tmp_path, feature):
    events = draw_events(1)
    found = counters.from_data(write_data(tmp_path, events), MANIFEST)
    asked = [
        (item, s) for item in ("a", "b", "c", "d", "new", "never seen") for s in range(999, 1000 + 10 * HOUR_S, 300)
    ]
    id_N, time_N = id_of(pa.array([item for item, _ in asked])), np.array([s for _, s in asked])
    until_s = found.as_of_s  # a later request is counted as of the last event
    wanted = [expected(events, feature, item, min(s, until_s)) for item, s in asked]
    assert found.count(feature, id_N, time_N).tolist() == wanted and max(wanted) > 5
    assert found.age_s(np.array([until_s - 5, until_s + 7])).tolist() == [0, 7]


DAY_S = 86_400
RATES = Feature("rates", ("candidate",), "numerical", counts="item", prior_exposures=20)
RATED = dataclasses.replace(MANIFEST, features=(*MANIFEST.features[:2], RATES))


def write_days(folder: pathlib.Path, shown: list[tuple[str, int, int]]) -> pathlib.Path:
    """Writes what a build with --rates leaves for serving; an exposure is (item, day, whether it was clicked)."""
    write_data(folder, [("a", 2 * DAY_S, True), ("b", 5 * DAY_S + 7, True)])
    pairs = sorted({(item, day) for item, day, _ in shown})
    clicks = [[click for item, day, click in shown if (item, day) == pair] for pair in pairs]
    columns = {"item_id": [item for item, _ in pairs], "moment_s": [day * DAY_S for _, day in pairs]}
    others = [float(len(found) - sum(found)) for found in clicks]
    columns |= {"clicks": [float(sum(found)) for found in clicks], "others": others}
    pq.write_table(pa.table(columns), folder / "counters" / "rates.parquet")
    return folder


def log_odds(shown: list[tuple[str, int, int]], item: str, day: int) -> float:
    earlier = [(other, click) for other, other_day, click in shown if other_day < day]
    own = [click for other, click in earlier if other == item]
    rate = (sum(click for _, click in earlier) + 1) / (len(earlier) + 2)
    return math.log((sum(own) + 20 * rate) / (len(own) - sum(own) + 20 * (1 - rate)))


def test_rates_of_every_moment_are_those_of_plain_python(tmp_path):
    """x was shown and is in no event; day 3 has no exposure; of a late counter the rates are those of its last day."""
    draw = random.Random(4)
    shown = [(draw.choice("abcx"), draw.choice((0, 1, 2, 4, 5)), int(draw.random() < 0.3)) for _ in range(300)]
    found = counters.from_data(write_days(tmp_path / "data", shown), RATED)
    assert counters.publish(tmp_path, found)
    found = counters.open_counters(tmp_path, RATED)
    asked = [(item, day, second) for item in ("a", "b", "x", "never") for day in range(9) for second in (0, 5, 86_399)]
    id_N = id_of(pa.array([item for item, *_ in asked]))
    time_N = np.array([day * DAY_S + second for _, day, second in asked])
    expected_N = [log_odds(shown, item, day) for item, day, _ in asked]
    np.testing.assert_allclose(found.count(RATES, id_N, time_N), expected_N, rtol=1e-6, atol=1e-7)
    assert expected_N[0] == 0 and len(set(expected_N)) > 20


def test_a_model_that_reads_rates_is_served_by_data_that_have_them(tmp_path):
    served(tmp_path / "ctr", RATED)
    without = data_of(tmp_path / "without", [("a", 10, True)])
    with pytest.raises(
        ValueError, match=r"reads rates of labels, which .*without does not have: build it with --rates"
    ):
        refresh(tmp_path / "ctr", without)
    assert counters.publish(tmp_path / "ctr", counters.from_data(without, MANIFEST))
    with pytest.raises(ArtefactError, match=r"lacks \['rates.code'\]"):
        counters.open_counters(tmp_path / "ctr", RATED)
    rated = write_days(tmp_path / "rated", [("a", 1, 1)])
    write_manifest(RATED, rated)
    assert "counters as of 1970-01-06" in refresh(tmp_path / "ctr", rated)
    found = counters.open_counters(tmp_path / "ctr", RATED)
    assert found.count(RATES, id_of(pa.array(["a"])), np.array([9 * DAY_S]))[0] > 0


def test_newer_counters_replace_older_ones_and_not_the_other_way(tmp_path):
    events, root = draw_events(2), tmp_path / "artefact"
    root.mkdir()
    old = counters.from_data(write_data(tmp_path / "old", events), MANIFEST)
    new = counters.from_data(write_data(tmp_path / "new", [*events, ("new", 10**6, True)]), MANIFEST)
    with pytest.raises(ArtefactError, match=r"counters\.json cannot be read"):
        counters.open_counters(root, MANIFEST)
    assert counters.publish(root, old) and counters.publish(root, new) and not counters.publish(root, old)
    opened = counters.open_counters(root, MANIFEST)
    assert opened.as_of_s == 10**6 + 1
    item = next(f for f in COUNTED if f.name == "count_0_item")
    assert opened.count(item, id_of(pa.array(["new"])), np.array([2 * 10**6])).tolist() == [1]
    newest = max((root / counters.FOLDER).glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtefactError, match="is not what was written"):
        counters.open_counters(root, MANIFEST)


def test_broken_counters_are_replaced_and_the_file_of_before_stays(tmp_path):
    found = counters.from_data(write_data(tmp_path / "data", draw_events(3)), MANIFEST)
    names = []
    for number, broken in enumerate(("{", "[]", '{"as_of_s": "soon"}', "{}", '{"file": [1]}')):
        (tmp_path / counters.POINTER_NAME).write_text(broken)
        (tmp_path / counters.FOLDER).mkdir(exist_ok=True)
        (tmp_path / counters.FOLDER / ".partial-1").write_bytes(b"of a command that was killed")
        found.as_of_s += 1 - 2 * (number % 2)
        assert counters.publish(tmp_path, found)
        names.append(counters.open_counters(tmp_path, MANIFEST).as_of_s)
    assert len(set(names)) == 2
    before = {path.name for path in (tmp_path / counters.FOLDER).iterdir()}
    found.as_of_s -= 10
    assert len(before) == 1 and counters.publish(tmp_path, found, accept_older=True)
    after = {path.name for path in (tmp_path / counters.FOLDER).iterdir()}
    assert before < after and len(after) == 2  # of two moments, the older one is in use


def test_counters_of_another_data_set_are_refused(tmp_path):
    found = counters.from_data(write_data(tmp_path / "data", draw_events(3)), MANIFEST)
    found.source = "t"
    assert counters.publish(tmp_path, found)
    with pytest.raises(ArtefactError, match=r"names counters of 't', and the model is of 's'"):
        counters.open_counters(tmp_path, MANIFEST)
    found.source, found.as_of_s = "s", 10
    assert counters.publish(tmp_path, found)  # older ones, but the others are no use
    place = tmp_path / counters.POINTER_NAME
    place.write_text(json.dumps({k: v for k, v in json.loads(place.read_text()).items() if k != "source"}))
    assert counters.open_counters(tmp_path, MANIFEST).as_of_s == 10  # written before there was a source


def test_a_log_that_ends_in_the_future_is_warned_of(tmp_path, caplog):
    assert counters.publish(tmp_path, counters.from_data(write_data(tmp_path / "a", [("a", 10, True)]), MANIFEST))
    assert not caplog.records
    late = int(time.time()) + 10**9
    assert counters.publish(tmp_path, counters.from_data(write_data(tmp_path / "b", [("a", late, True)]), MANIFEST))
    assert "is yet to come" in caplog.text and "--accept_older" in caplog.text


def served(root: pathlib.Path, manifest: Manifest = MANIFEST) -> pathlib.Path:
    """Writes a version without a model, which counts, and makes it current; returns its folder."""
    facts = {"source": {}, "packages": {}, "engine": "eager", "tolerance": 0.0, "limits": {}, "tables": {}}
    with drafting(root) as draft:
        version = draft.commit(**facts, manifest=json.loads(json.dumps(dataclasses.asdict(manifest))))
    make_current(root, version)
    return root / "versions" / version


def data_of(folder: pathlib.Path, events: list, **changes) -> pathlib.Path:
    """Writes a data set that has counters, and no rows."""
    write_data(folder, events)
    write_manifest(dataclasses.replace(MANIFEST, **changes), folder)
    return folder


def test_the_command_replaces_counters_by_newer_ones_of_the_same_log(tmp_path, capsys):
    root, version = tmp_path / "ctr", served(tmp_path / "ctr")
    new, old = data_of(tmp_path / "new", [("a", 20, True)]), data_of(tmp_path / "old", [("a", 10, True)])
    command = ["--artefact", str(version), "--data"]
    assert main([*command, str(new)]) == 0 and not (version / counters.POINTER_NAME).exists()
    assert capsys.readouterr().out == f"{root}: counters as of 1970-01-01T00:00:21Z\n"
    assert main([*command, str(old)]) == 2
    assert "with --accept_older" in capsys.readouterr().err
    assert main([*command, str(old), "--accept_older"]) == 0
    assert counters.open_counters(root, MANIFEST).as_of_s == 11
    with locked(root):
        assert main([*command, str(new)]) == 2
    assert "wait until it has ended" in capsys.readouterr().err


def test_what_data_lack_is_named(tmp_path):
    served(tmp_path / "ctr")
    without = tuple(f for f in MANIFEST.features if "category" not in (f.name, f.counts))
    tables = MANIFEST.tables[:1]
    neither = MANIFEST.features[:2]
    for name, changes, message in (
        ("a", {"source": "t"}, "another data set than .* .source 's' there, 't' here"),
        ("b", {"features": without, "tables": tables}, r"by \['category'\].*its items have no category; add that"),
        ("c", {"features": neither}, r"by \['category', 'item'\].* does not count: build it with --counts"),
    ):
        data = data_of(tmp_path / name, [("a", 10, True)], **changes)
        with pytest.raises(ValueError, match=message):
            refresh(tmp_path / "ctr", data)


def test_an_export_takes_no_counters_from_the_current_version(tmp_path):
    root, without = tmp_path / "ctr", tuple(f for f in MANIFEST.features if "category" not in (f.name, f.counts))
    small = data_of(tmp_path / "small", [("a", 10, True)], features=without, tables=MANIFEST.tables[:1])
    full = data_of(tmp_path / "full", [("a", 20, True)])

    def counted(data: pathlib.Path) -> counters.Counters | None:
        run = types.SimpleNamespace(data_dir=str(data))
        return exporter._counters(types.SimpleNamespace(manifest=read_manifest(data), run=run), root)

    root.mkdir()
    with locked(root):
        assert counters.publish(root, counted(small))  # there is no version yet
    served(root)
    with pytest.raises(ValueError, match=r"counts events by \['category'\], which .*small does not count"):
        counted(small)
    found = counted(full)
    found.as_of_s -= 20
    assert not counters.publish(root, found)
    found.as_of_s += 100
    assert counters.publish(root, found)
    assert counted(full).as_of_s == 21  # newer ones stay, and serve this version too
    place = root / counters.POINTER_NAME
    place.write_text(place.read_text().replace("sha256", "sha"))
    with pytest.raises(ArtefactError, match="is not what was written"):
        counted(full)


def test_data_and_models_without_counts_are_named(tmp_path):
    version = write_artefact(tmp_path / "artefact", tmp_path / "data")
    assert version
    with pytest.raises(ValueError, match="reads no counts, so there is nothing to refresh"):
        refresh(tmp_path / "artefact", tmp_path / "data")
    with pytest.raises(ValueError, match="has no counters; build it with --counts"):
        counters.from_data(tmp_path / "data", MANIFEST)


@pytest.fixture
def reader(tmp_path) -> RequestReader:
    """Reads requests; a and b are items of category x, and each occurred once, at 10 s."""
    vocabularies = {}
    for name, words in (("item", ["a", "b"]), ("category", ["x"])):
        Vocabulary.write(tmp_path / name, id_of(pa.array(words)), np.arange(2, 2 + len(words)))
        vocabularies[name] = Vocabulary.open(tmp_path / name, MANIFEST.table(name).num_rows)
    pq.write_table(pa.table({"index": [2, 3], "category": [2, 2]}), tmp_path / "items.parquet")
    Items.write(tmp_path / "items", tmp_path / "items.parquet", MANIFEST)
    counted = counters.from_data(write_data(tmp_path / "data", [("a", 10, True), ("b", 10, True)]), MANIFEST)
    return RequestReader(MANIFEST, vocabularies, Items.open(tmp_path / "items"), Limits(), counters=counted)


def test_a_client_that_brings_counts_does_not_change_those_of_another(reader):
    request = {"request_time_s": 100, "history.item": [], "history.time_s": [], "candidate.item": ["a", "b"]}
    brings = request | {"candidate.count_0_category": [4, None]}
    tokens = reader(reader.from_json([request, brings, request]))
    assert tokens.columns["candidate"]["count_0_category"].tolist() == [2, 2, 4, 2, 2, 2]
    assert tokens.columns["candidate"]["count_0_item"].tolist() == [1] * 6


def test_a_new_item_has_the_counts_of_the_values_that_it_brings(reader):
    """Where the counters describe the item, what they say counts: that is what training counted."""
    request = {"request_time_s": 100, "history.item": [], "history.time_s": [], "candidate.item": ["never", "a", "c"]}
    for category, expected in ((["x", "y", "x"], [2, 2, 2]), (["y", None, None], [0, 2, 0]), (None, [0, 2, 0])):
        brought = {} if category is None else {"candidate.category": category}
        found = reader(reader.from_json([request | brought])).columns["candidate"]
        assert found["count_0_category"].tolist() == found["count_3600_category"].tolist() == expected
        assert found["count_0_item"].tolist() == [0, 1, 0]


def test_counters_of_before_values_were_kept_count_by_item_alone(tmp_path):
    arrays = counters.from_data(write_data(tmp_path, [("a", 10, True)]), MANIFEST)._arrays
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".value")}
    feature = next(f for f in COUNTED if f.name == "count_0_category")
    id_N, value_N = (id_of(pa.array(names)) for names in (["never", "b"], ["x", "x"]))
    assert counters.Counters(arrays, 11).count(feature, id_N, np.array([50, 50]), value_N).tolist() == [0, 1]


def test_counters_of_another_log_of_the_same_source_are_refused(tmp_path, capsys):
    """Two generic logs may differ in their events alone; a log without its first days and with a late event is one."""
    root, version = tmp_path / "ctr", served(tmp_path / "ctr")
    events, other = draw_events(4), draw_events(5)
    late = [("a", 10**6, True)]
    same = [event for event in events if event[1] > 4000] + [("d", 5000, True)] + late
    command = ["--artefact", str(version), "--data"]
    assert main([*command, str(data_of(tmp_path / "first", events))]) == 0
    assert main([*command, str(data_of(tmp_path / "other", other + late))]) == 2
    assert "has counters of another log: of " in capsys.readouterr().err
    run = types.SimpleNamespace(data_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="counters of another log"):
        exporter._counters(types.SimpleNamespace(manifest=MANIFEST, run=run), root)
    assert main([*command, str(data_of(tmp_path / "same", same))]) == 0
    assert main([*command, str(tmp_path / "other"), "--accept_older"]) == 0
