"""How good is the second stage by itself? It gets the true first codebook of held-out clips.

    python refining.py                                   the refiner that ships
    python refining.py --guidance 2 1                    ... and with other guidance, and none
    python refining.py out/refiner/best out/attention/best --steps 100 50 25 10

The table stands between two bounds: the first codebook alone, and all nine true ones. A refiner
cannot know the true codes, for one sketch fits many pieces of music. So besides the distance from
the very clip (mel distance, and the share of codes that are the true ones), which punishes every
other way to be right, stand two figures that do not:

  FD    Frechet distance of the codec's log-band frames (160 bands, in dB) from those of the same
        clips with nine true codebooks; and from those of the audio as it was rendered
  flux  mean |change| of a band from frame to frame, over that of the nine true codebooks: below 1
        the music is smeared, above 1 it flickers

Needs FluidSynth, to render the held-out clips. Writes results/refiner.md, .csv, a picture of four
clips and, of runs that lie beside their log, the loss curves.
"""

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from audio import mel_distance
from checkpoint import load_text_encoder, read_config
from codec import load_codec
from data import Clips
from diffusion import load_refiner, refine
from evaluate import RESULTS, around, frechet_distance, interval, report
from options import entry
from paper import figures
from sample import SHIPPED_REFINER
from toy import corpus, words


def most_frequent(train, codes):
    """The guess that knows code 1 alone: each fine code the one that went with it most often in
    training. codes (B, 9, L) -> the same with guessed codebooks 2 ... 9."""
    counts = np.zeros((8, 1024, 1024), np.int32)
    for i in range(len(train)):
        first, *fine = train.codes(i)
        for table, code in zip(counts, fine):
            np.add.at(table, (first, code), 1)
    best = torch.from_numpy(counts.argmax(2))  # (8, 1024)
    return torch.cat([codes[:, :1], best[:, codes[:, 0]].transpose(0, 1)], 1)


def refine_all(folder, codec, true, captions, name, **options):
    """The first codebooks of true (B, 9, L), refined by a checkpoint -> codes (B, 9, L), and the
    seconds that each clip took"""
    refiner, encoder = load_refiner(folder), load_text_encoder(folder)
    made, seconds = [], []
    for i in trange(len(true), desc=name, disable=None, leave=False):
        started = time.time()
        pieces = refine(refiner, encoder, codec, captions[i], [true[i, :1]], i, **options)
        made.append(torch.cat([*pieces], 1))
        seconds.append(time.time() - started)
    return torch.stack(made), seconds


def measure(name, codec, true, codes, seconds=None, audio=None, rendered=None):
    """-> (name, {column: (value, interval)}) of codes (B, k, L) for clips with true ones (B, 9, L).
    audio (B, S), the clips as rendered, and its log-band frames (B, D, L) add columns."""
    cells = {}
    with torch.inference_mode():
        nine, mine = codec.from_codes(true), codec.from_codes(codes)  # (B, D, L)
        if audio is not None:
            bar = trange(len(codes), desc=f"{name}, decoding", disable=None, leave=False)
            mel = [
                mel_distance(audio[i : i + 1], codec.decode(codec.from_codes(codes[i : i + 1])))
                for i in bar
            ]
            cells["mel distance, dB"] = np.mean(mel), interval(np.array(mel))
    frames = lambda z: z.mT.flatten(0, 1).numpy()
    references = {"FD, nine codebooks": nine, "FD, rendered": rendered}
    for column, reference in ((c, r) for c, r in references.items() if r is not None):
        value = frechet_distance(frames(mine), frames(reference))
        draws = np.random.default_rng(0).integers(len(mine), size=(50, len(mine)))
        drawn = [frechet_distance(frames(mine[d]), frames(reference[d])) for d in draws]
        cells[column] = value, around(value, drawn)
    flux = lambda z: z.diff(dim=2).abs().mean((1, 2))  # (B,)
    ratio = (flux(mine) / flux(nine)).numpy()
    cells["flux"] = (flux(mine).mean() / flux(nine).mean()).item(), interval(ratio)
    if codes.shape[1] > 1:
        right = (codes[:, 1:] == true[:, 1:]).float().mean(2).numpy()  # (B, 8)
        for k in (0, 1):
            cells[f"code {k + 2} right"] = right[:, k].mean(), interval(right[:, k])
        cells["codes 2-9 right"] = right.mean(), interval(right.mean(1))
    if seconds:
        cells["seconds a clip"] = np.mean(seconds), interval(np.array(seconds))
    return name, cells


def loss_curves(folders):
    """-> figure of the training losses of runs, means of 50, from the log.jsonl above each
    checkpoint"""
    plt = figures.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, folder in enumerate(folders):
        with open(folder.parent / "log.jsonl") as lines:
            rows = [row for row in map(json.loads, lines) if "loss" in row]
        n = min(50, len(rows))
        losses = np.convolve([row["loss"] for row in rows], np.ones(n) / n, "valid")
        shape = read_config(folder)["model"]
        label = f"{shape['backbone']}, {shape['layers']} layers"
        steps = [row["step"] for row in rows[n - 1 :]]
        axis.plot(steps, losses, figures.COLOURS[i % 7], label=label)
    axis.set(xlabel="step", ylabel="squared error of v, training")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


def picture(path, columns):
    """Up to four clips below one another, each column (name, z (B, D, L)) a way to make them."""
    plt, top = figures.pyplot(), columns[-1][1].amax((1, 2))
    rows = min(4, len(top))
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(5 * len(columns), 2.75 * rows), sharex=True, squeeze=False
    )
    for row, line in enumerate(axes):
        for axis, (name, z) in zip(line, columns):
            clip = z[row, :, :430].numpy()
            axis.imshow(
                clip, origin="lower", aspect="auto", cmap="magma", extent=(0, 4.99, 0, len(clip)),
                vmin=top[row] - 70, vmax=top[row],
            )  # fmt: skip
            axis.set(title=name if row == 0 else "", xlabel="seconds" if row == rows - 1 else "")
        line[0].set_ylabel("band")
    figure.tight_layout()
    figure.savefig(path, dpi=55)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("refiners", nargs="*", help="checkpoints [the one that ships]")
    parser.add_argument("--steps", type=int, nargs="+", help="[as the checkpoint has it]")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[],
        help="besides the checkpoint's own: these, by the text and by the sketch alike",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=32, help="held-out clips [32]")
    args = parser.parse_args()
    codec = load_codec("toy")
    valid, train = (Clips(corpus.folder(), split, 9, codec.name) for split in ("valid", "train"))
    count = min(args.count, len(valid))
    true = torch.from_numpy(np.stack([valid.codes(i) for i in range(count)]))
    audio = torch.from_numpy(np.stack(corpus.play_clips([corpus.VALID * i for i in range(count)])))
    if (codec.encode(audio[:1])[0] != true[0]).float().mean() > 0.05:
        raise ValueError(
            "the clips as rendered here are not those of the corpus, so the FluidSynth or its font"
            " is another: apt-get install fluidsynth fluidr3mono-gm-soundfont"
        )
    captions = [
        words.caption(valid.rows[i]["factors"], np.random.default_rng([17, i]))
        for i in range(count)
    ]

    clips = dict(audio=audio, rendered=codec.features(audio).mT)
    rows = [measure("codebook 1 alone", codec, true, true[:, :1], **clips)]
    rows.append(measure("most frequent", codec, true, most_frequent(train, true), **clips))
    shown = [("codebook 1", codec.from_codes(true[:, :1]))]
    folders = [Path(folder) for folder in args.refiners] or [SHIPPED_REFINER]
    for folder in folders:
        own = dict(steps=25) | read_config(folder).get("sampling", {})
        others = [dict(guidance=g, sketch_guidance=g) for g in args.guidance]
        for steps, other in itertools.product(args.steps or [own["steps"]], [{}, *others]):
            options = own | other | dict(steps=steps)
            name = f"{os.path.relpath(folder)}, {steps} steps"
            name += f", guidance {other['guidance']:g}" if other else ""
            made, seconds = refine_all(folder, codec, true, captions, name, **options)
            rows.append(measure(name, codec, true, made, seconds, **clips))
            if folder == folders[0] and len(shown) == 1:
                shown.append((name, codec.from_codes(made)))
    rows.append(measure("nine true codebooks", codec, true, true, **clips))
    about = f"{count} held-out clips of 10 s; {torch.get_num_threads()} threads."
    report("refiner", "The second stage, from true first codebooks", rows, about)
    picture(RESULTS / "refiner.png", [*shown, ("nine codebooks", codec.from_codes(true))])
    if logged := [folder for folder in folders if (folder.parent / "log.jsonl").exists()]:
        figures.keep(loss_curves(logged), RESULTS / "refiner-loss")


if __name__ == "__main__":
    entry(main)
