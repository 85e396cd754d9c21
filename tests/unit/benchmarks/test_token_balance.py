import re

import numpy as np

from benchmarks import token_balance
from gpsd_dist.schema import write_manifest
from tests.unit.data.parquet_files import write_split


def test_both_cuts_are_measured_and_equal_tokens_are_more_even(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "skewed"
    manifest = write_split(folder, files=((500,), (500,)), lengths=np.repeat([40, 2], 500))
    write_manifest(manifest, folder)
    monkeypatch.setattr(token_balance, "CASES", ((20_000, 16),))
    assert token_balance.main(["--data_root", str(tmp_path), "--names", "skewed/pretrain"]) == 0
    rows, tokens = re.findall(r"mean ([\d.]+) %", capsys.readouterr().out)
    assert float(rows) > 3 * float(tokens)
