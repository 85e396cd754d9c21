"""Options of embedding tables; a part of `RunConfig`. Neither gin nor torch is imported here."""

import dataclasses

from gpsd_dist.validation import below, check_types, raise_all

SHARDING_TYPES = ("row_wise", "table_wise", "column_wise")
FROZEN_DTYPES = ("fp32", "fp16")
_STORED_MULTIPLE = 4  # FBGEMM's kernels read rows in pieces of 4 columns


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """Embedding tables."""

    embedding_dim: int = 64
    """E, width of every token table. Differs from the model width if a projection is wanted. Sharded rows are stored
    at the next multiple of 4 (FBGEMM's kernels); the padding is zero, never trained, and cut off after the lookup."""
    small_table_max_rows: int = 512
    """A table with at most this many rows is replicated with the dense part instead of sharded."""
    sharding: dict[str, str] = dataclasses.field(default_factory=dict)
    """Table name -> row_wise | table_wise | column_wise; tables not named are row_wise."""
    transfer: tuple[str, ...] = ("item",)
    """Tables that ST, FT, ST_SF and FT_SF take from the pretrained checkpoint, and that the SF strategies freeze."""
    init_std: float = 0.02
    """Standard deviation of the normal initial weights (official settings)."""
    frozen_dtype: str = "fp32"
    """Memory type of a frozen table: fp32 | fp16. At width 64 a row takes 256 or 128 bytes; what it does to AUC:
    docs/performance.md. Lookups give float32."""

    def __post_init__(self) -> None:
        check_types(self)
        problems = below(self, "embedding_dim", 1) + below(self, "small_table_max_rows", 0)
        if self.frozen_dtype == "int8":
            problems.append(
                "frozen_dtype 'int8' is not built any more; set fp16, which takes at most a third more memory, or read "
                "such a run with commit 14e4532, the last one that can"
            )
        elif self.frozen_dtype not in FROZEN_DTYPES:
            problems.append(f"frozen_dtype {self.frozen_dtype!r} is not one of {FROZEN_DTYPES}")
        for table, sharding in self.sharding.items():
            if sharding not in SHARDING_TYPES:
                problems.append(f"sharding of table {table!r} is {sharding!r}, not one of {SHARDING_TYPES}")
        raise_all(self, problems)

    @property
    def stored_dim(self) -> int:
        """Columns of a sharded table's rows: `embedding_dim`, padded."""
        return _STORED_MULTIPLE * -(-self.embedding_dim // _STORED_MULTIPLE)

    @property
    def frozen_value_bytes(self) -> int:
        """Bytes of each column of a frozen row."""
        return 2 if self.frozen_dtype == "fp16" else 4
