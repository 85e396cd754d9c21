"""The four recipes of docs/data.md, each built on a log that fits it."""

import re

import pyarrow as pa
import pytest

from tests.assets.cases import logs
from tests.unit.test_imports import REPO_ROOT

RECIPES = re.findall(r"```toml\n(.*?)```", (REPO_ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL)
EVENTS = logs.lines(logs.events(), "user_id,item_id,timestamp")
SHOWN = [(user, 1000 + n % 20, ts + 3 + n % 5, int(n % 3 == 0)) for n, (user, _, ts) in enumerate(logs.events())]
FILES = {
    "events.csv": EVENTS,
    "impressions.csv": logs.lines(SHOWN, "user_id,item_id,timestamp,click"),
    "log/country=FR/part-0.parquet": logs.table(logs.events()[:120]).rename_columns(
        ["user_id", "item_id", "timestamp"]
    ),
    "log/country=DE/part-0.parquet": logs.table(logs.events()[120:]).rename_columns(
        ["user_id", "item_id", "timestamp"]
    ),
    "log/_SUCCESS": "",
}


def test_there_are_four_recipes():
    assert len(RECIPES) == 4


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_a_recipe_builds(tmp_path, prepare, number):
    assert isinstance(FILES["log/country=FR/part-0.parquet"], pa.Table)
    logs.write(tmp_path / "raw", RECIPES[number], FILES)
    data = prepare("generic")
    assert data.manifest.split("train").num_candidates > 20
    assert data.manifest.split("test").num_rows > 0
    names = {feature.name for feature in data.manifest.features}
    assert names == ({"item", "country"} if "country" in RECIPES[number] else {"item"})
