"""Which smaller vocabularies a table may have grown from."""

import dataclasses

from gpsd_dist import schema
from gpsd_dist.checkpoint import growth
from gpsd_dist.checkpoint.transfer import with_frozen_rows
from gpsd_dist.config import RunConfig, TablesConfig
from tests.helpers.synthetic import make_manifest


def test_a_vocabulary_grows_and_a_hashed_table_does_not():
    manifest = make_manifest()
    names = [table.name for table in manifest.tables][:2]
    chain = [{"tables": [{"name": name, "num_rows": 5, "fingerprint": "earlier"} for name in names]}]
    grown = dataclasses.replace(manifest, options={"chain": chain}, unbounded={names[1]: schema.ID_KINDS[0]})
    assert growth.ancestors(grown) == {names[0]: {"earlier"}}


def test_a_day_without_new_ids_is_no_growth():
    manifest = make_manifest()
    chain = [{"tables": [dataclasses.asdict(table) for table in manifest.tables]}]
    found = growth.ancestors(dataclasses.replace(manifest, options={"chain": chain}))
    assert not any(found.values())


def test_auto_takes_the_rows_of_the_run_that_is_resumed():
    """A run of before the option has none; `check_resumable` says then that another option was given."""
    run = RunConfig(
        "finetune", "d", "o", strategy="ST_SF", init_checkpoint="runs/gone", tables=TablesConfig(frozen_rows="auto")
    )
    for saved, rows in (({"frozen_rows": {"item": 9}}, {"item": 9}), ({}, {})):
        assert with_frozen_rows(run, make_manifest(), {"tables": saved}).tables.frozen_rows == rows
