"""What train.py draws, and what evaluate.py prints of the paper."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import evaluate
from checkpoint import load_checkpoint
from paper.captions import HERE, read_rows


def add_published(table, number, seconds):
    """Adds columns to a table of evaluate.py: the parameters of each checkpoint, and the figures of
    the paper's Table `number` for the same variant, codebooks and blocks.

    They are in tables.csv, as VARIANT-CODEBOOKS-BLOCKS; 2b is Table II at 25 s.
    """
    number = "2b" if number == 2 and seconds > 10 else str(number)
    theirs = {r["system"]: r for r in read_rows(HERE / "tables.csv") if r["table"] == number}
    for row, cells in table.items():
        key = evaluate.stages(row.split(", ")[0])[0]
        if Path(key).exists() and evaluate.type_of(key) == "checkpoint":
            lm = load_checkpoint(key)
            cells["parameters, M"] = evaluate.Cell(sum(p.numel() for p in lm.parameters()) / 1e6)
            key = f"{lm.config.variant}-{lm.config.codebooks}-{lm.config.blocks}"
        for column in ("FD_openl3", "KL", "CLAP") if key in theirs else ():
            cells[f"{column}, paper"] = evaluate.Cell(float(theirs[key][column]))


def loss_curve(rows, path):
    """A run's log: training, and validation with right, shuffled and no captions."""
    x, y = np.array([(row["step"], row["loss"]) for row in rows if "loss" in row]).T
    n = min(50, len(y))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(x[n - 1 :], np.convolve(y, np.ones(n) / n, "valid"), "0.6", lw=1, label="training")
    for kind in ("right", "shuffled", "empty"):
        if points := [(row["step"], row[kind]) for row in rows if kind in row]:
            axis.plot(*zip(*points), "o-", ms=3, label=f"validation, {kind} captions")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=120)
