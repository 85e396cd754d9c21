"""Names what is run on fake CUDA tensors: label -> (stage, changes of the tiny run)."""

BF16 = {"train": {"bf16": True}}
GRAPHS = {"execution": {"token_multiple": 64, "cuda_graphs": True}}
CASES: dict[str, tuple[str, dict]] = {
    "pretrain": ("pretrain", {}),
    "pretrain/bf16": ("pretrain", BF16),
    "pretrain/bf16/dropout": ("pretrain", BF16 | {"model": {"dropout": 0.1}}),
    "pretrain/bf16/recompute": ("pretrain", BF16 | {"execution": {"activation_checkpointing": True}}),
    "pretrain/bf16/padded": ("pretrain", BF16 | {"execution": {"token_multiple": 64}}),
    "pretrain/bf16/position": ("pretrain", BF16 | {"pretrain": {"negatives_per": "position"}}),
    "pretrain/bf16/request": ("pretrain", BF16 | {"pretrain": {"negatives_per": "request"}}),
    "pretrain/bf16/item_bias": (
        "pretrain",
        BF16 | {"pretrain": {"item_bias": True, "log_q": True, "popular_share": 0.5}},
    ),
    "pretrain/bf16/projected": ("pretrain", BF16 | {"model": {"width": 32, "heads": 2}}),
    "finetune": ("finetune", {}),
    "finetune/bf16": ("finetune", BF16),
    "finetune/bf16/parts": ("finetune", {"train": {"bf16": True, "micro_batches": 2}}),
    "finetune/bf16/padded": ("finetune", BF16 | {"execution": {"token_multiple": 64}}),
    "finetune/bf16/esmm": ("finetune", BF16 | {"finetune": {"esmm": True}}),
    "finetune/bf16/no_clip": ("finetune", {"train": {"bf16": True, "clip_norm": 0.0}}),
    "pretrain/bf16/graphs": ("pretrain", BF16 | GRAPHS),
    "finetune/bf16/graphs": ("finetune", BF16 | GRAPHS),
    "finetune/bf16/graphs/ddp": (
        "finetune",
        BF16 | {"execution": GRAPHS["execution"] | {"dense_parallel": "ddp"}, "finetune": {"esmm": True}},
    ),
    "finetune/bf16/number_buckets": (
        "finetune",
        BF16 | {"model": {"number_buckets": True, "matches": True, "bag_matches": True}},
    ),
    "finetune/bf16/number_buckets/ddp": (
        "finetune",
        BF16 | {"model": {"number_buckets": True}, "execution": {"dense_parallel": "ddp"}},
    ),
    "pretrain/bf16/unknown_rate": ("pretrain", BF16 | {"data": {"unknown_rate": 0.3}}),
    "finetune/bf16/unknown_rate": ("finetune", BF16 | {"data": {"unknown_rate": 0.3}}),
    "finetune/bf16/average": ("finetune", {"train": {"bf16": True, "average_fraction": 0.1}}),
    "finetune/bf16/average/fsdp2": (
        "finetune",
        {"train": {"bf16": True, "average_fraction": 0.1}, "execution": {"dense_parallel": "fsdp2"}},
    ),
    "finetune/bf16/weights": (
        "finetune",
        BF16 | {"finetune": {"esmm": True}, "sampling": {"weight": 2.0, "negative_rate": 0.5}},
    ),
    "finetune/bf16/by_width": ("finetune", BF16 | {"model": {"parametrization": "by_width"}}),
    "finetune/bf16/hstu_no_time": (
        "finetune",
        BF16 | {"model": {"name": "hstu", "max_positions": 11, "time_bias": False}},
    ),
    **{
        f"{stage}/bf16/{kind}": (stage, BF16 | {"model": {"layers": 2}, "execution": {"dense_parallel": kind}})
        for stage in ("pretrain", "finetune")
        for kind in ("ddp", "fsdp2")
    },
    **{
        f"{stage}{suffix}/{name}": (stage, change | {"model": {"name": name, "max_positions": 11}})
        for name in ("hstu", "sasrec")
        for stage in ("pretrain", "finetune")
        for suffix, change in (("", {}), ("/bf16", BF16))
    },
    **{
        f"finetune{suffix}/{name}": ("finetune", change | {"model": {"name": name}})
        for name in ("deepfm", "din", "dien", "dmin", "wukong")
        for suffix, change in (("", {}), ("/bf16", BF16))
    },
    **{
        f"finetune/bf16/{name}/next_behaviour": (
            "finetune",
            BF16 | {"model": {"name": name}, "finetune": {"next_behaviour_weight": 0.1}},
        )
        for name in ("dien", "dmin")
    },
}

PLANTS = {
    "item": ("finetune/bf16", "DataDependentOutputException: aten._local_scalar_dense"),
    "mask": ("finetune/bf16", "DynamicOutputShapeException: aten.nonzero"),
    "copy": ("finetune/bf16", "host to device, (3,), blocking"),
    "host_tensor": ("finetune/bf16", "index on the host"),
    "written_mask": ("finetune/bf16/unknown_rate", "index by a mask"),
    "host_weights": ("finetune/bf16/weights", "FakeTensorDeviceMismatchError"),
    "host_edges": ("finetune/bf16/number_buckets", "FakeTensorDeviceMismatchError"),
    "host_average": ("finetune/bf16/average", "on cuda:0 and on cpu"),
    "host_targets": ("pretrain/bf16/graphs", "FakeTensorDeviceMismatchError"),
    "item_in_graph": ("finetune/bf16/graphs", "DataDependentOutputException: aten._local_scalar_dense"),
    "buffers": ("finetune/bf16/number_buckets/ddp", "1 broadcasts of buffers"),
}
"""Faults that the dry run has to find, of what `dry_run.planted_<name>` adds to a clean case: name -> (case, found)."""


STEPS_TWICE = ("pretrain/bf16", "finetune/bf16", "finetune/bf16/fsdp2", "finetune/bf16/hstu")
SAVED = ("pretrain", "finetune/bf16", "finetune/bf16/ddp", "finetune/bf16/fsdp2")
SCORED = (
    "finetune",
    "finetune/bf16",
    "finetune/bf16/fsdp2",
    *(f"finetune/bf16/{name}" for name in ("hstu", "sasrec", "deepfm", "din", "dien", "dmin", "wukong")),
)
"""Which cases take two steps, are saved, and are scored: one for each piece of code that differs there."""
