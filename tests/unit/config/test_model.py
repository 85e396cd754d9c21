"""Which model reads which option: the declaration against what towers really take, and what follows from it."""

import dataclasses
import inspect

import pytest

from gpsd_dist.config import ModelConfig
from gpsd_dist.config.model import MODELS, saved_revision, size_text
from gpsd_dist.model.registry import TOWERS

FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
BY_THE_BACKBONE = {"name", "width", "dropout", "init_std", "parametrization", "context_dim", "compile", "revision"}
BY_THE_BACKBONE |= {"matches", "bag_matches", "number_buckets"}
"""For projections, input dropout, heads."""
OTHER_VALUES = {"layers": 9, "width": 8, "heads": 2, "time_bias": False, "compile": True, "dropout": 0.1, "revision": 1}
OTHER_VALUES |= {"parametrization": "by_width", "matches": True, "bag_matches": True, "number_buckets": True}


class Watched:
    """A ModelConfig that notes what is read of it."""

    def __init__(self, config: ModelConfig):
        self._config, self.read = config, set()

    def __getattr__(self, name):
        if name in FIELDS:
            self.read.add(name)
        return getattr(self._config, name)


def build(name: str):
    return TOWERS[name](ModelConfig(name, layers=1, width=8, heads=2, max_positions=12), 3)


def test_every_tower_is_declared():
    assert MODELS.keys() == TOWERS.keys()


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_can_do_what_is_declared(name):
    """A generative tower returns a state of its own width per token; others need candidates."""
    traits, tower = MODELS[name], build(name)
    parameters = inspect.signature(tower.forward).parameters
    assert traits.supervises_history == ("with_history" in parameters)
    assert traits.has_blocks == hasattr(tower, "blocks")
    assert traits.is_generative == (not tower.reads_fields)
    tables = [value for key, value in tower.named_parameters() if "position" in key and len(value) == 12]
    assert traits.has_position_table == bool(tables), [key for key, _ in tower.named_parameters()]


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_reads_what_is_declared_and_nothing_else(name):
    watched = Watched(ModelConfig(name, layers=1, width=8, heads=2, max_positions=12))
    TOWERS[name](watched, 3)
    assert watched.read | BY_THE_BACKBONE == MODELS[name].reads


@pytest.mark.parametrize("name", TOWERS)
def test_unread_are_changed_options_alone(name):
    assert ModelConfig(name).unread() == []
    for field in FIELDS[1:]:
        changed = ModelConfig(name, **{field: OTHER_VALUES.get(field, 96)})
        assert changed.unread() == ([] if field in MODELS[name].reads else [field])


def test_a_foreign_option_is_refused_but_a_size_of_another_model_is_not():
    """Files set layers and heads for every model; head_width is set for one."""
    ModelConfig("sasrec", ffn_width=5).refuse_foreign()
    ModelConfig("din", layers=9, heads=2).refuse_foreign()
    with pytest.raises(ValueError, match=r"ModelConfig: head_width 5 has no effect on 'sasrec'"):
        ModelConfig("sasrec", head_width=5).refuse_foreign()


@pytest.mark.parametrize(
    ("name", "text"),
    [("transformer", "L9H64A4"), ("hstu", "L9H64A4"), ("din", "H64"), ("dmin", "H64A4"), ("wukong", "L9H64")],
)
def test_a_title_shows_the_sizes_that_are_read(name, text):
    assert size_text(dataclasses.asdict(ModelConfig(name, layers=9))) == text


@pytest.mark.parametrize(("width", "revision"), [(64, 2), (32, 1)])
def test_the_revision_of_an_old_run_is_the_newest_that_computes_the_same(width, revision):
    """Only projections, and the three models with other layers, tell the revisions apart."""
    for name in MODELS:
        expected = 1 if name in ("deepfm", "dmin", "wukong") else revision
        assert saved_revision({"name": name, "width": width}, 64) == expected
    assert saved_revision({}, 64) == 2
    assert [ModelConfig(revision=r).projection_eps for r in (1, 2, 3)] == [1e-5, 1e-6, 1e-6]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_other_layers_is_refused_with_the_commit_that_reads_it(name):
    ModelConfig(name).check_revision()
    if name in ("deepfm", "dmin", "wukong"):
        with pytest.raises(ValueError, match=f"model '{name}' of revision 1 .* read such a run with commit 14e4532"):
            ModelConfig(name, revision=1).check_revision()
    else:
        ModelConfig(name, revision=1).check_revision()


@pytest.mark.parametrize("name", ["of a later version", None, ["din"]])
def test_a_title_of_a_damaged_file_shows_what_there_is(name):
    assert size_text({"name": name, "layers": 2}) == "L2H?A?"
