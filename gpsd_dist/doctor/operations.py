"""Runs one small operation per dependency for `doctor`: each returns what it did, or raises.

Imports happen inside the functions, so that one broken package does not hide the state of the others.
"""

import importlib.util
import io
import pathlib
import tempfile
import typing
from collections.abc import Callable


def torch_attention() -> str:
    """Runs matmul and attention, forward and backward."""
    import torch

    query = torch.linspace(-1, 1, 2 * 4 * 8).reshape(1, 2, 4, 8).requires_grad_()
    hidden = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    (hidden @ hidden.transpose(-1, -2)).sum().backward()
    assert query.grad is not None and bool(query.grad.isfinite().all()), "gradient is not finite"
    return f"matmul and causal attention with gradient, {torch.get_num_threads()} threads"


def fbgemm_jagged() -> str:
    """Runs a jagged operator of fbgemm."""
    import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
    import torch

    dense = torch.ops.fbgemm.jagged_to_padded_dense(torch.arange(3.0)[:, None], [torch.tensor([0, 1, 3])], [2], 0.0)
    assert dense[..., 0].tolist() == [[0.0, 0.0], [1.0, 2.0]], f"wrong result {dense.tolist()}"
    return "jagged_to_padded_dense"


def torchrec_lookup() -> str:
    """Looks up one row of an EmbeddingCollection."""
    import torch
    import torchrec

    config = torchrec.EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=3, feature_names=["f"])
    tables = torchrec.EmbeddingCollection(tables=[config])
    ids = torchrec.KeyedJaggedTensor(keys=["f"], values=torch.tensor([2]), lengths=torch.tensor([1]))
    row = tables(ids)["f"].values()
    assert torch.equal(row[0], tables.embeddings["t"].weight[2]), "looked up the wrong row"
    return "EmbeddingCollection looked up one row"


def pyarrow_parquet() -> str:
    """Writes a list column to Parquet and reads it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, buffer = pa.table({"x": [[1, 2], []]}), io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    assert pq.read_table(buffer).equals(table), "Parquet round trip changed the table"
    return "Parquet round trip, zstd"


def ibis_duckdb() -> str:
    """Runs a grouped Ibis query on DuckDB."""
    import ibis

    table = ibis.memtable({"user": [1, 1, 2], "time_s": [5, 7, 6]})
    last = table.group_by("user").agg(last_s=table.time_s.max()).order_by("user")
    found = ibis.duckdb.connect().to_pyarrow(last).to_pylist()
    assert found == [{"user": 1, "last_s": 7}, {"user": 2, "last_s": 6}], f"wrong result {found}"
    return "grouped query on DuckDB"


def gin_parse() -> str:
    """Parses one binding with gin's parser alone: binding it would leave global state behind."""
    importlib.util.find_spec("gin")  # gin 0.5.0 uses importlib.util without importing it
    from gin import config_parser

    # The delegate resolves references and macros, of which this text has none.
    (statement,) = list(config_parser.ConfigParser("Model.width = 64", None))
    assert (statement.selector, statement.arg_name, statement.value) == ("Model", "width", 64), f"parsed {statement}"
    return "parsed one binding"


def pydantic_dataclass() -> str:
    """Checks one option with pydantic's compiled core."""
    import pydantic

    model = pydantic.create_model("Model", width=(typing.Annotated[int, pydantic.Field(ge=1)], ...))
    assert model(width=64).model_dump() == {"width": 64}, "a right value was changed"
    try:
        model(width=0)
    except pydantic.ValidationError:
        return "one option checked"
    raise AssertionError("a wrong value was accepted")


def lightgbm_tree() -> str:
    """Fits one boosted tree."""
    import lightgbm
    import numpy as np

    feature_NF = np.arange(40.0)[:, None]
    options = {"objective": "binary", "min_data_in_leaf": 1, "num_threads": 1, "verbosity": -1}
    booster = lightgbm.train(options, lightgbm.Dataset(feature_NF, feature_NF[:, 0] >= 20), 1)
    low, high = booster.predict(np.array([[0.0], [39.0]]))
    assert low < 0.5 < high, f"one split gave {low} and {high}"
    return "one boosted tree"


def tensorboard_writer() -> str:
    """Writes an event file into a temporary folder."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("doctor", 1.0, 0)
        assert any(path.stat().st_size for path in pathlib.Path(folder).iterdir()), "no event file was written"
    return "wrote one scalar"


def gloo_group() -> str:
    """Reduces over a process group of one rank; skipped inside another group."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return "skipped: a process group exists already"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            value = torch.ones(1)
            dist.all_reduce(value)
        finally:
            dist.destroy_process_group()
    assert value.item() == 1.0, f"all_reduce over one rank gave {value.item()}"
    return "process group of one rank, all_reduce"


OPERATIONS: dict[str, tuple[str, Callable[[], str]]] = {  # name in the report -> distribution that it exercises
    "torch op": ("torch", torch_attention),
    "fbgemm op": ("fbgemm-gpu fbgemm-gpu-cpu", fbgemm_jagged),
    "torchrec op": ("torchrec", torchrec_lookup),
    "pyarrow op": ("pyarrow", pyarrow_parquet),
    "ibis op": ("ibis-framework duckdb", ibis_duckdb),
    "gin op": ("gin-config", gin_parse),
    "pydantic op": ("pydantic pydantic-core", pydantic_dataclass),
    "lightgbm op": ("lightgbm", lightgbm_tree),
    "tensorboard op": ("tensorboard", tensorboard_writer),
    "gloo": ("torch", gloo_group),
}
