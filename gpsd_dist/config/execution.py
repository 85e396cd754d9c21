"""How a step runs: options of speed, memory and exchange. What is computed is in `run.py` and `model.py`."""

import dataclasses

from gpsd_dist.validation import below, check_types, raise_all

PIPELINES = ("plain", "sparse_dist")
DENSE_PARALLEL = ("ddp", "fsdp2")
BLOCK_MODELS = ("transformer", "sasrec", "hstu")  # whose activations can be computed again block by block
EXCHANGE_TYPES = ("fp32", "fp16", "bf16")


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """Execution of the training step."""

    activation_checkpointing: bool = False
    """Keep only the input of every tower block and compute the rest again in the backward: about a third more FLOPs,
    the same bits. For long histories. transformer, sasrec, hstu."""
    exchange_forward: str = "fp32"
    """fp32 | fp16 | bf16: how table rows travel from the rank that has them. Less than fp32 changes results."""
    exchange_backward: str = "fp32"
    """The same for the gradients of rows, on their way back. fp16: scaled by 1024, so that 64 is the largest."""
    pipeline: str = "plain"
    """plain | sparse_dist: while a step computes, TorchRec copies the next batch to the device and exchanges its
    indices. The same bits; on CPU there is nothing to gain."""
    dense_parallel: str = "ddp"
    """ddp | fsdp2: every rank keeps the whole dense part, or a part of its weights, gradients and optimizer state,
    which are gathered block by block as they are needed (fully_shard). For towers that do not fit otherwise."""
    token_multiple: int = 0
    """transformer: the tower's history tokens and candidates are padded to a multiple of this in training, so that it
    meets few shapes; 0: no padding. With --gin.DataConfig.global_batch_tokens the number of tokens hardly varies."""
    cuda_graphs: bool = False
    """Compile the tower for each padded shape and replay it as a CUDA graph: for small towers, whose kernels take less
    time than their launch. Needs token_multiple, TrainConfig.bf16 (only flash attention has few shapes) and a batch in
    one part (micro_batches); not with options for large towers. On CPU: nothing."""

    def __post_init__(self) -> None:
        check_types(self)
        choices = {
            "exchange_forward": EXCHANGE_TYPES,
            "exchange_backward": EXCHANGE_TYPES,
            "pipeline": PIPELINES,
            "dense_parallel": DENSE_PARALLEL,
        }
        given = {name: getattr(self, name) for name in choices}
        problems = [f"{n} {v!r} is not one of {choices[n]}" for n, v in given.items() if v not in choices[n]]
        problems += below(self, "token_multiple", 0)
        if self.cuda_graphs and not self.token_multiple:
            problems.append("cuda_graphs needs few shapes: set token_multiple, to 1024 for example")
        if self.cuda_graphs and (self.activation_checkpointing or self.dense_parallel == "fsdp2"):
            problems.append("cuda_graphs is for small towers, activation_checkpointing and fsdp2 are for large ones")
        raise_all(self, problems)


DEFAULT = ExecutionConfig()
