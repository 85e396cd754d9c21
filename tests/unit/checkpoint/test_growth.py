"""Which smaller vocabularies a table may have grown from."""

import dataclasses

from gpsd_dist import schema
from gpsd_dist.checkpoint import growth
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
