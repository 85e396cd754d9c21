"""Holds the options of embedding tables."""

import dataclasses
import typing

from gpsd_dist.validation import MAY_CHANGE, AtLeast0, AtLeast1, Names, OrAuto, checked, one_of

SHARDING_TYPES = ("row_wise", "table_wise", "column_wise")
FROZEN_DTYPES = ("fp32", "fp16")
NEW_ROWS = ("attributes", "unknown", "random")
_STORED_MULTIPLE = 4  # FBGEMM's kernels read rows in pieces of 4 columns
_NO_INT8 = (
    "is not built any more; set fp16, which takes at most a third more memory, or read such a run with commit 14e4532, "
    "the last one that can"
)


@checked()
class TablesConfig:
    """Says how embedding tables are sized, stored, sharded and transferred."""

    embedding_dim: AtLeast1 = 64
    """E, width of every token table. Differs from the model width if a projection is wanted. Sharded rows are stored
    at the next multiple of 4 (FBGEMM's kernels); the padding is zero, never trained, and cut off after the lookup."""
    small_table_max_rows: AtLeast0 = 512
    """A table with at most this many rows is replicated with the dense part instead of sharded."""
    sharding: dict[str, typing.Annotated[str, one_of(SHARDING_TYPES)]] = dataclasses.field(
        default_factory=dict, metadata=MAY_CHANGE
    )
    """Table name -> row_wise | table_wise | column_wise; tables not named are row_wise."""
    transfer: Names = ("item",)
    """Tables that ST, FT, ST_SF and FT_SF take from the pretrained checkpoint, and that the SF strategies freeze."""
    init_std: float = 0.02
    """Standard deviation of the normal initial weights (official settings)."""
    frozen_dtype: typing.Annotated[str, one_of(FROZEN_DTYPES, int8=_NO_INT8)] = "fp32"
    """Memory type of a frozen table: fp32 | fp16. At width 64 a row takes 256 or 128 bytes; what it does to AUC:
    docs/performance.md. Lookups give float32."""
    new_rows: typing.Annotated[str, one_of(NEW_ROWS)] = "attributes"
    """Start values of rows that the data set has gained since INIT_CHECKPOINT (`--append_to`). unknown: the unknown
    row; attributes: for items, that plus the mean of the old rows with the same attributes, minus the mean of all old
    rows; random: as in a fresh table."""
    frozen_rows: typing.Annotated[dict[str, AtLeast0], OrAuto] = dataclasses.field(default_factory=dict)
    """Table -> first rows that stay frozen while all later ones are trained; ST_SF and FT_SF alone. 'auto': the rows of
    INIT_CHECKPOINT in each table that has grown since, so new rows are trained alone."""

    @property
    def stored_dim(self) -> int:
        """Counts the columns of a sharded table's rows: `embedding_dim`, padded."""
        return _STORED_MULTIPLE * -(-self.embedding_dim // _STORED_MULTIPLE)

    @property
    def frozen_value_bytes(self) -> int:
        """Counts the bytes of each column of a frozen row."""
        return 2 if self.frozen_dtype == "fp16" else 4
