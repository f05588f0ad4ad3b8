"""The paper's numbers and figures.

    python -m paper.figures figure2 out/simba/step-* ...   metrics against the training step
    python -m paper.figures figure3 SYSTEM ...             spectrograms of one prompt
    python -m paper.figures codebooks                      what 1 ... 9 codebooks keep of real clips
    python -m paper.figures tempo SYSTEM ...               does the beat follow "jazz at 96 bpm"?

Each takes the options of evaluate.py, and all but figure3 write its table as well.
"""

import csv
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import evaluate
from audio import FRAME_RATE, mel_spectrogram, read_audio
from checkpoint import load_checkpoint
from options import entry, new_parser, read_lines

CODECS = " ".join(f"codec-{k}" for k in range(1, 10))
FROM_TABLES = {  # command: options of evaluate.py, the rows to draw, what their number is
    "figure2": ("--prompts sentence --name figure2", r"(.+)/step-(\d+)", "training step"),
    "codebooks": (f"{CODECS} --name codebooks", r"(codec)-(\d)", "codebooks"),
    "tempo": ("--prompts bpm genre --name tempo", "", ""),
}


def add_published(table, number, seconds):
    """Adds columns to a table of evaluate.py: the parameters of each checkpoint, and the figures of
    the paper's Table `number` for the same variant, codebooks and blocks.

    They are in tables.csv. Table I: 10 s, step 20,000, codebook 1 alone. II: 10 s; IIb: 25 s;
    simba-9: one stage, nine codebooks. IV: simba of so many blocks, 25 s. The paper says 94.4 M
    parameters for 6 blocks; by its own architecture they have 72.4 M.
    """
    number = "2b" if number == 2 and seconds > 10 else str(number)
    with open(Path(__file__).with_name("tables.csv"), encoding="utf-8") as lines:
        theirs = {row["system"]: row for row in csv.DictReader(lines) if row["table"] == number}
    for row, cells in table.items():
        key = evaluate.stages(row.split(", ")[0])[0]
        if Path(key).exists() and evaluate.type_of(key) == "checkpoint":
            lm = load_checkpoint(key)
            cells["parameters, M"] = evaluate.Cell(sum(p.numel() for p in lm.parameters()) / 1e6)
            key = lm.config.variant + ("-9" if lm.config.codebooks == 9 else "")
            key = str(lm.config.blocks) if number == "4" and key == "simba" else key
        for column in ("FD_openl3", "KL", "CLAP") if key in theirs else ():
            cells[f"{column}, paper"] = evaluate.Cell(float(theirs[key][column]))


def draw(name, pattern, xlabel):
    """Draws the metrics of results/NAME.csv against the number in a row's name -> NAME.png."""
    with open(evaluate.RESULTS / f"{name}.csv", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    metrics = [column for column in rows[0] if re.fullmatch(r"(FD|KL|CLAP)\w*", column)]
    for axis, metric in zip(figure.subplots(1, len(metrics)), metrics):
        series = {}
        for row in rows:
            if found := re.match(pattern, row[""]):
                values = [float(row[metric + end]) for end in ("", " low", " high")]
                series.setdefault(found[1], []).append((int(found[2]), *values))
        for label, points in series.items():
            x, y, low, high = zip(*sorted(points))
            axis.plot(x, y, "o-", label=label)
            axis.fill_between(x, low, high, alpha=0.15)
        axis.set(title=metric, xlabel=xlabel)
        axis.legend()
    figure.savefig(evaluate.RESULTS / f"{name}.png", dpi=100)


def figure3(systems):
    """Mel spectrograms of what each system plays to the paper's jazz-reggae prompt, row by row."""
    prompts = read_lines(Path(__file__).with_name("figure3.txt"))
    figure = Figure(figsize=(9, 0.6 + 1.8 * len(systems)), layout="constrained")
    axes = figure.subplots(len(systems), 1, sharex=True, squeeze=False)[:, 0]
    for axis, system in zip(axes, systems):
        (file,) = evaluate.music(system, prompts, 10.0)
        mel = mel_spectrogram(read_audio(file))[0].numpy()  # (bands, T) in dB
        shape = dict(origin="lower", aspect="auto", extent=(0, mel.shape[1] / FRAME_RATE, 0, 128))
        image = axis.imshow(mel, cmap="magma", vmin=-90, vmax=-10, **shape)
        axis.set(title=system, ylabel="mel band")
    axis.set(xlabel="seconds")
    figure.colorbar(image, ax=axes, label="dB")
    evaluate.RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(evaluate.RESULTS / "figure3.png", dpi=64)


def loss_curve(rows, path):
    """A run's log: training, and validation with right, shuffled and no captions."""
    x, y = np.array([(row["step"], row["loss"]) for row in rows if "loss" in row]).T
    n = min(50, len(y))
    refining = any("right_blind" in row for row in rows)
    second = ("_blind", "without codebook 1") if refining else ("_1s", "the first second")
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    axes[0].plot(x[n - 1 :], np.convolve(y, np.ones(n) / n, "valid"), "0.6", lw=1, label="training")
    for axis, (suffix, title) in zip(axes, (("", "whole windows"), second)):
        for kind in ("right", "shuffled", "empty"):
            points = [(r["step"], r[kind + suffix]) for r in rows if kind + suffix in r]
            axis.plot(*zip(*points), "o-", ms=3, label=f"validation, {kind} captions")
        unit = "squared error of v" if refining else "nats per token"
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend()
    worst = max(r[kind] for r in rows for kind in ("right", "shuffled", "empty") if kind in r)
    axes[0].set_ylim(top=1.1 * worst)  # the first steps' losses would flatten all the others
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("figure", choices=[*FROM_TABLES, "figure3"])
    args, more = parser.parse_known_args(argv)
    if args.figure == "figure3":
        return figure3(evaluate.parse_arguments(more).systems)
    options, pattern, xlabel = FROM_TABLES[args.figure]
    evaluate.main([*options.split(), *more])
    if pattern:
        draw(args.figure, pattern, xlabel)


if __name__ == "__main__":
    entry(main)
