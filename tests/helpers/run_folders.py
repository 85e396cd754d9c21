"""Run folders made by hand, in the form that `gpsd_dist.train` and `gpsd_dist.evaluate` write."""

import dataclasses
import json
import math
import pathlib
import typing

from gpsd_dist import config, schema

TASKS = ("click", "buy")
STEPS = (10, 20, 30, 40)
STEPS_PER_EPOCH = 20
START_S = 1_700_000_000.0
MANIFEST = schema.Manifest(
    source="handmade",
    features=(
        schema.Feature("item", ("history", "candidate"), table="item"),
        schema.Feature("age", ("context",), kind="numerical", mean=40.0, std=10.0),
    ),
    tables=(schema.Table("item", 1234, "f00d"),),
    tasks=(schema.Task("click"), schema.Task("buy", given="click")),
    splits=(
        schema.Split("pretrain", ("pretrain/part-00000.parquet",), 50, 1500, 0, None, None),
        schema.Split("train", ("train/part-00000.parquet",), 4321, 98765, 8642, 1_600_000_000, 1_600_086_400),
        schema.Split("valid", ("valid/part-00000.parquet",), 100, 3000, 200, 1_600_086_400, 1_600_172_800),
    ),
    max_history_length=50,
    split_rule="by the phase of the moon",
    skipped={"rows of nobody": 17},
    sources=({"path": "raw/log.csv", "bytes": 3 * 2**20, "sha256": "abcdef0123456789"},),
    command="python -m data_pipeline.build --source handmade",
)


def write_run(
    folder: pathlib.Path,
    strategy: str = "NT",
    seed: int = 0,
    *,
    stage: str = "finetune",
    data_dir: str | pathlib.Path = "data/handmade",
    init_checkpoint: str | pathlib.Path = "",
    auc: float = 0.7,
    world_size: int = 1,
    scores: dict[str, typing.Any] | None = None,
    options: dict[str, typing.Any] | None = None,
) -> pathlib.Path:
    """A finished run whose best step is the last but one; `auc` is its valid click AUC there. Returns the folder.

    `options`: other values in run_config.json, by dotted name. `scores`: split -> content of `<split>.json`.
    """
    folder.mkdir(parents=True)
    is_frozen = strategy.endswith("SF")
    init = init_checkpoint or ("" if strategy == "NT" else "runs/pretrain")
    run = config.RunConfig(stage, str(data_dir), str(folder), strategy, str(init), seed=seed)
    run_config = json.loads(json.dumps(dataclasses.asdict(run)))
    for name, value in (options or {}).items():
        *parents, leaf = name.split(".")
        place = run_config
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    entries = [_entry(stage, step, auc - 0.01 * abs(step - STEPS[-2]) / 10) for step in STEPS]
    best = {name.removeprefix("valid/"): v for name, v in entries[-2].items() if name.startswith("valid/")}
    state = {
        "step": STEPS[-1],
        "data_position": {},
        "progress": {"best_value": auc, "best_step": STEPS[-2], "stale": 1, "is_finished": True},
        "metrics": {},
        "run_config": run_config,
        "manifest": dataclasses.asdict(MANIFEST),
        "world_size": world_size,
    }
    argv = ["/src/gpsd_dist/train.py", "--gin_file", "configs/stage/finetune.gin", f"--gin.SEED={seed}"]
    argv.append("--gin.TRANSFER_TABLES=('item',)")
    environment = {
        "argv": argv,
        "commit": "c0ffee",
        "python": "3.11.7",
        "platform": "Linux",
        "versions": {"torch": "2.13.0+cpu", "fbgemm-gpu": None},
        "world_size": world_size,
        "device": "cpu",
        "threads_per_rank": 1,
    }
    write_json(folder / "run_config.json", run_config)
    write_json(folder / "environment.json", environment)
    (folder / "config.gin").write_text(f"SEED = {seed}\n")
    (folder / "plan.txt").write_text(f"table item: {'frozen' if is_frozen else 'trainable'}, row_wise\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_json(folder / "checkpoints/best.json", {"step": STEPS[-2], "metrics": best})
    write_json(folder / f"checkpoints/step_{STEPS[-1]:08d}/run_state.json", state)
    for split, content in (scores or {}).items():
        write_json(folder / f"{split}.json", content)
    return folder


def _entry(stage: str, step: int, auc: float) -> dict[str, float]:
    entry = {"step": step, "epoch": step / STEPS_PER_EPOCH, "wall_time_s": START_S + step}
    entry |= {"train/loss": 1.0 - step / 100, "train/dense_lr": 1e-3 * math.cos(step / 40)}
    entry |= {"perf/examples_per_s": 100.0 + step, "perf/tokens_per_s": 4000.0 + step, "perf/step_ms": 50.0}
    entry |= {"perf/data_wait_share": 0.012, "perf/cpu_s": float(step), "perf/peak_rss_gib": 1.0 + step / 100}
    if stage == "pretrain":
        return entry | {"train/next_item_loss": 5.0, "valid/next_item/mrr": 0.02 + step / 1e4}
    for task in TASKS:
        loss = 0.6 - step / 1000
        entry |= {f"train/{task}_loss": loss, f"gap/{task}_log_loss": step / 1000, f"valid/{task}/auc": auc}
        entry |= {f"valid/{task}/log_loss": loss + step / 1000, f"valid/{task}/rows": 200.0}
    return entry


def scored(auc: float, **metrics: float | None) -> dict[str, dict[str, float | None]]:
    """What `gpsd_dist.evaluate` writes for a finetuned run."""
    return {task: {"auc": auc, "log_loss": 0.5, "rows": 200} | metrics for task in TASKS}


def broken_down(auc: float, half_width: float = 0.02) -> dict[str, typing.Any]:
    """Scores as `scored` makes them, with a breakdown: three lengths of histories, known and new items, one day."""
    groups = {
        "history": [_group("0", 50, auc - 0.1), _group("1-2", 60, auc), _group("11-20", 90, auc + 0.05)],
        "item": [_group("known", 150, auc), _group("new", 50, None)],
        "day": [_group("2024-02-29", 200, auc)],
    }
    bins = [{"rows": 100, "predicted": p, "observed": y} for p, y in ((0.1, 0.08), (0.4, 0.45))]
    made = {"half_width": {"auc": half_width, "log_loss": 0.01}, "calibration": bins, "groups": groups}
    return {task: values | {"label_rate": 0.3, "breakdown": made} for task, values in scored(auc).items()}


def _group(name: str, rows: int, auc: float | None) -> dict[str, typing.Any]:
    facts = {"name": name, "rows": rows, "positives": rows // 3, "auc": auc, "log_loss": 0.5, "calibration": 1.0}
    return facts | {"auc_half_width": None if auc is None else 0.03}


def write_json(path: pathlib.Path, content: typing.Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_data(data_dir: pathlib.Path, manifest: schema.Manifest = MANIFEST) -> pathlib.Path:
    """A data folder that holds a manifest and no data."""
    data_dir.mkdir(parents=True, exist_ok=True)
    schema.write_manifest(manifest, data_dir)
    return data_dir
