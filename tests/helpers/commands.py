"""What tests that start the real commands share: a tiny run as gin, and an environment without a group."""

import os

TINY_GIN = """
LAYERS = 1
WIDTH = 16
HEADS = 2
EMBEDDING_DIM = 16
GLOBAL_BATCH_ROWS = 8
MAX_HISTORY_LENGTH = 10
TablesConfig.small_table_max_rows = 20
DataConfig.num_data_shards = 2
DataConfig.eval_batch_rows_per_rank = 4
PretrainConfig.num_negative_groups = 2
PretrainConfig.num_negatives = 16
TrainConfig.log_interval_steps = 1
"""
"""A run of seconds on the data of `integration.tiny_data`; EPOCHS is left to the test."""


def environment(*dropped: str, **changes: str) -> dict[str, str]:
    """That of this process on one thread of the CPU, without the group it may be in."""
    left_out = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *dropped}
    ours = {name: value for name, value in os.environ.items() if name not in left_out}
    return ours | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | changes
