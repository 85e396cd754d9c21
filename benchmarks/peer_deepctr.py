"""Trains DIN of DeepCTR-Torch on rows of the official form. Started by `benchmarks.peers`, in that peer's environment.

python peer_deepctr.py FOLDER BATCH      prints `step N` after every epoch of N steps in all
"""

import pathlib
import sys

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DIN

LONGEST, WIDTH = 50, 64


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Reads samples.txt: padded columns by feature name, and labels."""
    lines = [line.split(",") for line in (folder / "samples.txt").read_text().splitlines()]
    length = np.array([int(line[5]) for line in lines])
    inputs = {"item": np.array([int(line[1]) for line in lines]), "cate": np.array([int(line[2]) for line in lines])}
    for name, key in (("item", "item__item_id:"), ("cate", "item__cate_id:")):
        padded = np.zeros((len(lines), LONGEST), np.int64)
        for row, line in enumerate(lines):
            events = (
                [part.split("#")[name == "cate"].removeprefix(key) for part in line[4].split(";")] if line[4] else []
            )
            padded[row, : len(events)] = [int(event) for event in events[-LONGEST:]]
        inputs[f"hist_{name}"] = padded
    return inputs | {"seq_length": np.minimum(length, LONGEST)}, np.array([int(line[3]) for line in lines])


def main(folder: pathlib.Path, batch: int) -> None:
    """Trains without end; whole batches alone, as the step count says."""
    torch.set_num_threads(1)
    inputs, label = read(folder)
    kept = len(label) // batch * batch
    inputs, label = {name: values[:kept] for name, values in inputs.items()}, label[:kept]
    columns = []
    for name in ("item", "cate"):
        table = SparseFeat(name, int(inputs[f"hist_{name}"].max(initial=inputs[name].max())) + 1, embedding_dim=WIDTH)
        history = SparseFeat(f"hist_{name}", table.vocabulary_size, embedding_dim=WIDTH, embedding_name=name)
        columns += [table, VarLenSparseFeat(history, maxlen=LONGEST, length_name="seq_length")]
    model = DIN(columns, ["item", "cate"], device="cpu", att_weight_normalization=True)
    model.compile("adam", "binary_crossentropy")
    steps = 0
    while True:
        model.fit(inputs, label, batch_size=batch, epochs=1, verbose=0)
        steps += kept // batch
        print(f"step {steps}", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
