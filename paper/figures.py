"""What a run says at its end; pictures of its losses and of audio; a checkpoint's README.md."""

import textwrap
import warnings
from collections import Counter
from dataclasses import asdict, fields

import numpy as np
import torch

from audio import FRAME_RATE, HOP, N_FFT, mel_spectrogram
from options import flag


def conclude(log, objective, run):
    """The last lines of a run, and its picture."""
    if cut := objective.encoder.cut:
        print(f"{cut:,} captions were cut to {objective.encoder.max_tokens} tokens")
    rows = [row for row in log.rows if "right" in row]
    best = min(rows, key=lambda row: row["right"])
    loss = f"{best['right']:.3f} {unit(objective.codec)}"
    print(f"{run}: best validation loss {loss}, at step {best['step']}")
    below = best["right"] - log.recent_loss()
    if rows[-1]["right"] > 1.01 * best["right"] and below > 0:
        print(f"It overfits since then: the training loss is {below:.3f} lower; {run}/best plays.")
    loss_curve(log.rows, run / "loss.png")
    print(f"The curve is in {run}/loss.png")


def loss_curve(rows, path):
    """A run's log: training, and validation with right, shuffled and no captions."""
    from matplotlib.figure import Figure

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


def card(trainer, presets):
    """A checkpoint's README.md, for the hub: what it is, from what it was made, and how. presets:
    train.PRESETS"""
    model, data = trainer.kept.config, trainer.data
    preset = presets["refiner" if data.refining else "lm"]["paper"]
    kind, option = ("refiner", "refiner") if data.refining else (model.variant, "checkpoint")
    hours = sum(row["frames"] for row in data.train.rows) / FRAME_RATE / 3600
    licences = Counter(row.get("licence", "composed by toy/") for row in data.train.rows)
    default = {f.name: f.default for k in (model, trainer.config) for f in fields(k)} | preset
    command = f"python train.py --preset paper --variant {model.variant}"
    for name, value in (asdict(model) | asdict(trainer.config)).items():
        if value == default[name] or name in ("variant", "data", "out", "init_from"):
            continue
        if isinstance(value, bool):
            command += f" {flag(name if value else 'no_' + name)}"
        else:
            command += f" {flag(name)} {value}"
    return f"""---
tags: [music, text-to-audio, state-space-model]
---
# A {kind} for text-to-music

{sum(p.numel() for p in trainer.kept.parameters()):,} parameters; codes of {data.codec_name}.
Played by `python sample.py "jazz reggae" --{option} FOLDER`.

- Data: {data.folder.name}, {len(data.train):,} clips, {hours:.1f} hours
- Licences of the clips: {", ".join(f"{name} ({n:,})" for name, n in licences.most_common())}
- Validation loss: {trainer.best:.3f} {unit(data.refining)}, at step {trainer.step:,}

`{command}`
"""


def unit(refining):
    return "(squared error of v)" if refining else "nats per token"


class Picture:
    """A mel-spectrogram of a stream of audio: below 3,000 columns, whatever its length."""

    def __init__(self, samples):
        self.size = HOP * max(1, samples // HOP // 1500)  # samples a column
        # One table from the start: many small tensors would fragment the memory.
        self.mel = torch.zeros(128, 2 + samples // self.size)
        self.columns = 0

    def watch(self, chunks):
        """Yields the chunks (samples,) as they are."""
        rest = torch.zeros(0)
        for chunk in chunks:
            rest = torch.cat([rest, chunk])
            count = len(rest) // self.size
            if count * self.size >= N_FFT:
                now, rest = rest.tensor_split([count * self.size])
                mel = mel_spectrogram(now[None])[0]  # (128, frames)
                columns = slice(self.columns, self.columns + count)
                self.mel[:, columns] = mel.unflatten(1, (count, -1)).mean(2)
                self.columns += count
            yield chunk

    def save(self, path, title, sample_rate):
        from matplotlib.figure import Figure

        mel = self.mel[:, : max(1, self.columns)].numpy()
        size = (0, mel.shape[1] * self.size / sample_rate, 0, len(mel))  # of the axes
        figure = Figure(figsize=(10, 3.5), layout="tight")
        axis = figure.subplots()
        look = dict(origin="lower", aspect="auto", cmap="magma", vmin=mel.max() - 80)
        image = axis.imshow(mel, extent=size, **look)
        axis.set(
            title=textwrap.fill(title, 90).replace("$", r"\$"), xlabel="seconds", ylabel="mel band"
        )
        figure.colorbar(image, label="dB")
        with warnings.catch_warnings(action="ignore"):  # letters that no font here has
            figure.savefig(path, dpi=110)
