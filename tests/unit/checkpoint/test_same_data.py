"""Which data are those of a run: a number may have quantiles where an older build measured none."""

import dataclasses
import hashlib
import json
import types

import pytest

from gpsd_dist.checkpoint import resume
from gpsd_dist.fit import data_check
from gpsd_dist.trained_run import check_same_schema
from tests.helpers.synthetic import make_manifest


def plain(manifest) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(manifest)))


def with_numbers(manifest, **changes):
    return dataclasses.replace(
        manifest,
        features=tuple(dataclasses.replace(f, **changes) if f.table is None else f for f in manifest.features),
    )


def test_data_built_again_with_quantiles_are_those_of_an_old_run():
    old = make_manifest()
    new, other = with_numbers(old, quantiles=(0.0, 0.5)), with_numbers(old, quantiles=(0.0, 0.7))
    names = sorted(feature.name for feature in old.features if feature.table is None)
    assert names
    for saved, now in ((old, old), (old, new), (new, new)):
        check_same_schema(now, plain(saved), "run", "data")
        assert not resume._other_data(plain(now), types.SimpleNamespace(manifest=plain(saved)))
    for saved, now in ((new, old), (new, other), (old, with_numbers(new, std=3.0))):
        with pytest.raises(ValueError, match=r"differs from what run was trained on in .'features'."):
            check_same_schema(now, plain(saved), "run", "data")
        found = resume._other_data(plain(now), types.SimpleNamespace(manifest=plain(saved)))
        assert found == [f"features {names}"]


def test_a_fit_goes_on_with_data_that_have_quantiles_now():
    old = make_manifest()
    parts = {name: plain(old)[name] for name in ("features", "tables", "tasks", "splits")}
    for feature in parts["features"]:  # as it was hashed before there were such fields
        for name in ("log", "quantiles", "counts", "window_s", "prior_exposures"):
            del feature[name]
    expected = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert data_check.fingerprint(old) == data_check.fingerprint(with_numbers(old, quantiles=(0.0, 0.5))) == expected
    assert data_check.fingerprint(with_numbers(old, log=True)) != expected
