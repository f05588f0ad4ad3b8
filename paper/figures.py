"""What the paper published, and figures fit for a talk: evaluate.py measures, this draws.

Colours are Okabe and Ito's, which colour-blind people tell apart, and every series has a marker or
a line style of its own besides. Each figure is written as PNG and as SVG.
"""

from pathlib import Path
from string import ascii_lowercase

import numpy as np

from audio import FRAME_RATE, under_another_name

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS, LINES = "os^DvP*", ["-", "--", "-.", ":"]
# The paper's names of the variants; `evaluate.named` adds the codebooks, where they are several.
NAMES = {
    "mamba": "Prefix Mamba", "simba": "Prefix SiMBA", "cross-simba": "Cross SiMBA",
    "transformer": "Cross Transformer",
}  # fmt: skip

# SSMTTM, Table I: 10 s clips at step 20k, the first codebook alone: FD_openl3, KL, CLAP.
TABLE1 = {
    "codec, 1 codebook": (59.3433, 1.4950, 0.1950),
    "Prefix Mamba": (107.0340, 1.8837, 0.1450),
    "Prefix SiMBA": (102.7248, 1.5106, 0.1776),
    "Cross SiMBA": (118.4306, 1.3012, 0.1240),
    "Cross Transformer": (99.2973, 3.1077, 0.1150),
}
# Table II: all codebooks, 10 s and 25 s.
TABLE2 = {
    "MusicGen-small": ((109.1424, 1.8371, 0.2422), (125.8558, 1.3879, 0.2234)),
    "Prefix SiMBA, 9 codebooks": ((98.6492, 1.1952, 0.2360), (107.2963, 0.6902, 0.2280)),
    "Cross Transformer": ((83.1081, 1.4994, 0.1852), (97.3981, 1.2494, 0.1630)),
    "Prefix SiMBA": ((74.4559, 1.2948, 0.2370), (85.2023, 0.9408, 0.2495)),
}
# Table IV: Prefix SiMBA/Diffusion of 24, 12 and 6 blocks, 25 s. The paper gives 94.4 M parameters
# for 6 blocks; its own architecture has 72.4 M.
TABLE4 = {
    24: (85.2023, 0.9408, 0.2495),
    12: (88.1027, 1.1073, 0.2547),
    6: (82.0459, 0.9284, 0.2442),
}
# Footnote 1, the prompt of Figure 3.
JAZZ_REGGAE = (
    "This is the recording of a jazz reggae concert. There is a saxophone lead playing a solo."
    " There is a keyboard and an electric guitar playing the main tune with the backing of a bass"
    " guitar. In the rhythmic background, there is an acoustic reggae drum beat. The atmosphere is"
    " groovy and chill. This piece could be playing in the background at a beach. It could also be"
    " included in the soundtrack of a summer/vacation/tropical themed movie."
)


def published(figures):
    """(FD, KL, CLAP) -> the cells of a table's columns for the paper's figures"""
    return dict(zip(("FD_openl3", "KL", "CLAP"), (f"{x:.4g}" for x in figures)))


def curves(path, series, metrics, xlabel, levels=None):
    """One panel a metric. series: {name: (x, {metric: [(value, (low, high))]})}; metrics: {column:
    "up" or "down", the better direction}; levels: {name: {metric: value}}, horizontal lines."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.6 * len(metrics), 3.8), squeeze=False)
    for axis, (metric, better) in zip(axes[0], metrics.items()):
        for i, (name, (x, columns)) in enumerate(series.items()):
            values = [value for value, *_ in columns[metric]]
            low, high = np.array([bounds for _, bounds, *_ in columns[metric]]).T
            style = dict(color=COLOURS[i % 7], marker=MARKERS[i % 7], linestyle=LINES[i % 4])
            axis.plot(x, values, label=name, **style)
            axis.fill_between(x, low, high, color=COLOURS[i % 7], alpha=0.15, linewidth=0)
        for name, cells in (levels or {}).items():
            axis.axhline(cells[metric], color="0.35", linestyle=":", label=name)
        axis.set(title=f"{metric} ({'higher' if better == 'up' else 'lower'} is better)")
        axis.set(xlabel=xlabel, ylabel=metric)
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False)
    keep(figure, path)


def spectrograms(path, clips, title):
    """clips: {name: mel spectrogram (mels, T) in dB} -> one panel each, on one colour scale."""
    plt = pyplot()
    rows = -(-len(clips) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(12, 3.1 * rows + 0.6), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    top = max(float(mel.max()) for mel in clips.values())
    for axis in axes.flat[len(clips) :]:
        axis.set_axis_off()
    for axis, letter, (name, mel) in zip(axes.flat, ascii_lowercase, clips.items()):
        seconds = mel.shape[1] / FRAME_RATE
        image = axis.imshow(
            mel, origin="lower", aspect="auto", cmap="cividis", vmin=top - 80, vmax=top,
            extent=(0, seconds, 0, len(mel)),
        )  # fmt: skip
        axis.set(title=f"({letter}) {name}", xlabel="seconds", ylabel="mel band")
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="dB")
    keep(figure, path, tight=False)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def keep(figure, path, tight=True):
    """Writes PATH.png and PATH.svg."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if tight:
        figure.tight_layout()
    for kind in ("png", "svg"):
        # Not with_suffix: a name may hold 2.5 s.
        with under_another_name(path.with_name(f"{path.name}.{kind}")) as part:
            figure.savefig(part, format=kind, dpi=160)
    pyplot().close(figure)


def loss_curve(rows, path):
    """A run's log: training, and validation with right, shuffled and no captions."""
    plt = pyplot()
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    x, y = np.array(steps).T
    n = min(50, len(y))
    refining = any("right_blind" in row for row in rows)
    second = ("_blind", "without codebook 1") if refining else ("_1s", "the first second")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharex=True)
    axes[0].plot(x[n - 1 :], np.convolve(y, np.ones(n) / n, "valid"), "0.6", lw=1, label="training")
    for axis, (suffix, title) in zip(axes, (("", "whole windows"), second)):
        for kind, color in (("right", "C0"), ("shuffled", "C1"), ("empty", "C2")):
            points = [(r["step"], r[kind + suffix]) for r in rows if kind + suffix in r]
            axis.plot(*zip(*points), "o-", color=color, ms=3, label=f"validation, {kind} captions")
        unit = "squared error of v" if refining else "nats per token"
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend()
    worst = max(r[kind] for r in rows for kind in ("right", "shuffled", "empty") if kind in r)
    axes[0].set_ylim(top=1.1 * worst)  # the first steps' losses would flatten all the others
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
