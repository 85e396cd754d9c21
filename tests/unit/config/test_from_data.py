"""Options that are left to the data: which numbers follow from a manifest, and whose number wins."""

import dataclasses

import pytest

from gpsd_dist.config import DataConfig, ModelConfig, OptimizerConfig, PretrainConfig, RunConfig, TrainConfig
from gpsd_dist.config.from_data import left_to_data, resolve
from gpsd_dist.schema import Manifest, Split
from gpsd_dist.validation import AUTO
from tests.helpers.synthetic import make_manifest


def manifest_of(rows: int, candidates_per_row: int = 10, tokens_per_row: int = 10) -> Manifest:
    splits = tuple(
        Split(
            name, (), rows, rows * tokens_per_row, rows * (0 if name == "pretrain" else candidates_per_row), None, None
        )
        for name in ("pretrain", "train", "valid", "test")
    )
    return dataclasses.replace(make_manifest(), splits=splits)


def run_of(stage: str = "finetune", model: ModelConfig | None = None, **changes) -> RunConfig:
    """A run that leaves everything open that can be."""
    run = RunConfig(
        stage=stage,
        data_dir="data",
        output_dir="runs/a",
        data=DataConfig(global_batch_rows=AUTO),
        model=model or ModelConfig(layers=1, width=32, dropout=AUTO),
        dense=OptimizerConfig("adamw", AUTO),
        train=TrainConfig(epochs=AUTO, warmup_fraction=AUTO, eval_per_epoch=2, patience=AUTO),
        pretrain=PretrainConfig(AUTO if stage == "pretrain" else 0.05),
    )
    return dataclasses.replace(run, **changes)


def steps(run: RunConfig, rows: int) -> int:
    return -(-rows // run.data.global_batch_rows) * run.train.epochs


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("rows", [1, 40, 2_019, 33_676, 10**6, 10**9])
def test_every_size_gets_numbers_that_are_valid(stage, rows):
    run, line = resolve(run_of(stage), manifest_of(rows))
    assert left_to_data(run) == []
    assert line.startswith("chosen from the data: global_batch_rows ") and "dropout" in line
    assert 16 <= run.data.global_batch_rows <= 512
    assert 0 <= run.model.dropout <= 0.2
    assert 0 < run.train.warmup_fraction <= 0.1
    assert run.train.warmup_fraction * steps(run, rows) <= 500 + 1e-6
    dataclasses.replace(run.train), dataclasses.replace(run.model)  # the options' own rules hold


def test_small_logs_get_hundreds_of_steps_and_large_ones_few_epochs():
    """2,019 requests in batches of 512 were four steps of an epoch."""
    small, large = (resolve(run_of(), manifest_of(rows))[0] for rows in (2_019, 10**7))
    assert (small.data.global_batch_rows, small.train.epochs, steps(small, 2_019)) == (64, 16, 512)
    assert (large.data.global_batch_rows, large.train.epochs) == (512, 3)


def test_patience_is_a_third_of_the_run_and_nothing_without_validation():
    small, large = (resolve(run_of(), manifest_of(rows))[0] for rows in (2_019, 10**7))
    assert (small.train.patience, large.train.patience) == (11, 3)
    unvalidated = manifest_of(2_019)
    splits = tuple(dataclasses.replace(s, num_rows=0) if s.name == "valid" else s for s in unvalidated.splits)
    assert resolve(run_of(), dataclasses.replace(unvalidated, splits=splits))[0].train.patience == 0


@pytest.mark.parametrize(
    ("rows", "batch"), [(19, 16), (148, 16), (494, 16), (1_000, 32), (1_970, 64), (2_019, 64), (4_100, 128)]
)
def test_a_log_of_few_requests_gets_smaller_batches(rows, batch):
    """494 requests in batches of 64 are 128 steps: DIN had a valid AUC of 0.74 of a planted match, 0.80 with 16."""
    assert resolve(run_of(), manifest_of(rows))[0].data.global_batch_rows == batch


def test_dropout_follows_parameters_per_example():
    wide = ModelConfig(layers=4, width=64, dropout=AUTO)
    rates = [resolve(run_of(model=wide), manifest_of(rows))[0].model.dropout for rows in (2_000, 20_000, 200_000)]
    assert rates == [0.2, 0.0, 0.0]
    narrow = ModelConfig("din", width=16, layers=9, dropout=AUTO)  # it has no layers
    assert resolve(run_of(model=narrow), manifest_of(2_000))[0].model.dropout == 0


def test_heads_get_matches_unless_a_run_began_without():
    left = ModelConfig(matches=AUTO, bag_matches=AUTO)
    small, large = (resolve(run_of(model=left), manifest_of(rows)) for rows in (147, 4_000_000))
    assert (small[0].model.matches, large[0].model.matches) == (True, True)
    assert small[0].model.bag_matches and large[0].model.bag_matches
    assert "matches True" in small[1] and "matches True" in large[1]
    assert resolve(run_of(model=ModelConfig(matches=False)), manifest_of(9))[0].model.matches is False
    saved = dataclasses.asdict(small[0]) | {
        "model": {**dataclasses.asdict(small[0].model), "matches": False, "bag_matches": False}
    }
    before = resolve(run_of(model=left), manifest_of(9), saved)[0].model
    assert before.matches is False and before.bag_matches is False


def test_a_run_from_before_weights_were_averaged_goes_on_without():
    left = run_of(train=TrainConfig(average_fraction=AUTO))
    new = resolve(left, manifest_of(9))[0]
    assert new.train.average_fraction == 0.1
    saved = dataclasses.asdict(new) | {"train": {**dataclasses.asdict(new.train), "average_fraction": 0.0}}
    assert resolve(left, manifest_of(9), saved)[0].train.average_fraction == 0.0


@pytest.mark.parametrize(
    ("stage", "expected"), [("finetune", [3e-3, 3e-3, 1.5e-3, 5e-4]), ("pretrain", [5e-3, 5e-3, 2.5e-3, 5e-4])]
)
def test_the_rate_falls_with_the_width(stage, expected):
    rates = [
        resolve(run_of(stage, model=ModelConfig(width=width, heads=4)), manifest_of(100))[0].dense.peak_lr
        for width in (32, 64, 128, 4096)
    ]
    assert rates == expected


def test_a_given_value_wins_and_the_others_follow_from_it():
    run, line = resolve(run_of(data=DataConfig(global_batch_rows=7)), manifest_of(2_019))
    assert run.data.global_batch_rows == 7 and "global_batch_rows" not in line
    assert run.train.epochs == 3  # 289 steps each
    tokens, _ = resolve(run_of(data=DataConfig(global_batch_rows=AUTO, global_batch_tokens=640)), manifest_of(2_019))
    assert (tokens.data.global_batch_rows, tokens.train.epochs) == (0, 16)
    short = DataConfig(global_batch_rows=AUTO, global_batch_tokens=640, max_history_length=10)
    long, _ = resolve(run_of(data=short), manifest_of(2_019, tokens_per_row=500))  # the model sees 10 of 500
    assert long.train.epochs == 16


def test_a_run_without_open_options_is_left_alone():
    run, _ = resolve(run_of(), manifest_of(2_019))
    assert resolve(run, manifest_of(10**6)) == (run, "")


def test_the_numbers_of_a_saved_run_are_taken():
    saved = dataclasses.asdict(resolve(run_of(), manifest_of(2_019))[0])
    saved["train"]["epochs"] = 5
    run, line = resolve(run_of(), manifest_of(10**6), saved)
    assert (run.data.global_batch_rows, run.train.epochs) == (64, 5)
    assert line.startswith("of the run before: ")


@pytest.mark.parametrize(
    ("rows", "before", "words"),
    [
        (AUTO, {"global_batch_rows": 0, "global_batch_tokens": 640}, ("a batch is requests now", "640 history tokens")),
        (32, {"global_batch_rows": 0, "global_batch_tokens": 640}, ("GLOBAL_BATCH_ROWS=0", "global_batch_tokens=640,")),
        (
            AUTO,
            {"global_batch_rows": 64},
            ("a batch is 99 history tokens now", "64 requests in", "ROWS=64"),
        ),
        (0, {"global_batch_rows": 64}, ("a batch is 99 history tokens now", "another OUTPUT_DIR")),
    ],
)
def test_a_run_by_tokens_does_not_go_on_by_requests(rows, before, words):
    """Nor the other way: their batches are other ones. 'auto' would make both numbers 0."""
    saved = dataclasses.asdict(run_of(data=DataConfig(**before)))
    tokens = 0 if before.get("global_batch_tokens") else 99
    with pytest.raises(ValueError, match="in the run that goes on or is refitted") as refused:
        resolve(run_of(data=DataConfig(global_batch_rows=rows, global_batch_tokens=tokens)), manifest_of(9), saved)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("text", ["Auto", "automatic", -1, None])
def test_other_words_are_no_numbers(text):
    with pytest.raises(ValueError, match="TrainConfig: epochs"):
        TrainConfig(epochs=text)


def test_temperature_is_higher_where_a_click_model_follows():
    labelled = manifest_of(2_000)
    unlabelled = dataclasses.replace(labelled, tasks=())
    chosen = [resolve(run_of("pretrain"), manifest)[0].pretrain.temperature for manifest in (labelled, unlabelled)]
    assert chosen == [0.2, 0.1]
    given = run_of("pretrain", pretrain=PretrainConfig(0.3))
    assert resolve(given, labelled)[0].pretrain.temperature == 0.3
    resumed, _ = resolve(run_of("pretrain"), labelled, saved=dataclasses.asdict(resolve(given, labelled)[0]))
    assert resumed.pretrain.temperature == 0.3  # whatever today's rule says
