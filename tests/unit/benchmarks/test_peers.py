"""Peers are metered from outside: whole steps, the CPU seconds of their own process, and stopped between turns."""

import argparse
import dataclasses
import pathlib
import sys

import pytest

from benchmarks import datasets, peers

# Has the command line, the files and the log of the official code, and no model.
TRAIN = """
import sys, time
config = dict(line.split(" = ") for line in open(sys.argv[2]).read().splitlines() if line)
for name in ("train.data_path", "ItemTokenizer.table_path", "CateTokenizer.table_path"):
    for line in open(eval(config[name])):
        columns = line.rstrip("\\n").split(",")
        assert len(columns) == (6 if name == "train.data_path" else 2), line
        if len(columns) == 6:
            events = [dict(x.split(":") for x in event.split("#")) for event in columns[4].split(";") if event]
            assert all(set(event) == {"item__item_id", "item__cate_id"} for event in events)
            assert len(events) == int(columns[5])
step, log_steps = 0, int(config["train.log_steps"])
while True:
    begin = time.process_time()
    while time.process_time() - begin < 0.01:
        pass
    step += 1
    if (step - 1) % log_steps == 0:
        print(f"epoch: 1/9 global_step: {step}/900, loss: 1.0", flush=True)
"""


@pytest.fixture
def rows(tmp_path):
    source = dataclasses.replace(
        datasets.SOURCES["grocery"], draw_lengths=datasets.Geometric(5, 12), num_items=40, num_rows=16
    )
    return lambda kind, per_row: datasets.prepare_synthetic(kind, kind, source, per_row, tmp_path)


@pytest.mark.parametrize(("kind", "per_row"), [("pretrain", 0), ("discriminative_k2", 2)])
def test_a_checkout_is_metered_by_whole_steps_and_stands_still_between_turns(rows, tmp_path, kind, per_row):
    checkout = tmp_path / "checkout"
    (checkout / "src").mkdir(parents=True)
    (checkout / "src" / "train.py").write_text(TRAIN)
    data = rows(kind, per_row)
    side = peers.official(checkout, sys.executable, data, tmp_path / "run", True)
    try:
        for _ in range(2):
            turn = side.turn(0.1)
            assert turn.samples % 512 == 0 and 0.1 <= turn.cpu_s < 2
            assert turn.samples / 512 * 0.009 < turn.cpu_s
            state = pathlib.Path(f"/proc/{side.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state == "T"
    finally:
        side.close()
    lines = [line.split(",") for line in (tmp_path / "run" / "samples.txt").read_text().splitlines()]
    assert len(lines) == 16 * max(per_row, 1)
    assert {line[3] for line in lines} == ({"2"} if kind == "pretrain" else {"0", "1"})
    num_events = sum(int(line[5]) for line in lines[:: max(per_row, 1)])
    split = data.manifest.split(data.split)
    assert num_events == split.num_history_tokens - (16 if kind == "pretrain" else 0)


def test_a_peer_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1; it said:.*KeyError: 'no loguru'"):
        peers.Stranger([sys.executable, "-c", "raise KeyError('no loguru')"], tmp_path, {}, peers._STEP["official"])


def test_ratios_compare_turns_of_one_round():
    peer, ours = [peers.Turn(10, 2.0), peers.Turn(10, 4.0)], [peers.Turn(100, 1.0), peers.Turn(50, 1.0)]
    assert peers.ratios(peer, ours) == [20.0, 20.0]


def test_a_wrong_checkout_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        peers.main(["--official", str(tmp_path)])
    assert "has no src/train.py" in capsys.readouterr().err


def test_no_kind_leaves_deepctr_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "environment_of", lambda peer, _: peer)
    args = argparse.Namespace(official=None, deepctr=True, env_dir=tmp_path, kinds="")
    assert [duel.peer for duel in peers._duels(args)] == ["DeepCTR-Torch 0.3.0, DIN"]
