"""Does long music keep to its words? With and without reading the text again.

    python -m experiments.words                          the shipped model, 32 prompts, 60 s
    python -m experiments.words --seconds 600            ten minutes
    python -m experiments.words out/simba/best out/mamba/best --name mine     your own

Writes results/words.md, .csv and .png; of another length words-600.md and so on. Held-out prompts;
all measures are of the same samples:

  distance   of the next-token distributions with and without the prompt (total variation)
  told       the prompt is the likeliest of eight, for the model reading those ten seconds alone
  FD, ...    what the toy judge hears in the first and the last ten seconds, refined
  rise       of the bands, in dB, where the text is read again, and elsewhere
  repeated   seconds of the longest run of tokens that was there before, without overlap
"""

import os
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import sample
from audio import FRAME_RATE
from evaluate import RESULTS, Task, judged, mean, report, stages
from options import check_value, entry, new_parser
from toy import questions
from toy.judge import load_judge

TEN = 861  # frames


def measure(models, seconds, count):
    """Checkpoints, {name: folder} -> a table and {name: distance at each frame (T,)}"""
    judge, table, curves = load_judge(), {}, {}
    for name, folder in models.items():
        system = sample.System(*stages(folder))
        asked = questions.ask(system.codec, count, ["sentence"])
        task = Task(seconds=10.0, codec=system.codec, **asked)
        prompts = task.prompts["sentence"]
        for way, kept in {name: None, f"{name}, never read again": 0}.items():
            codes, distance = play(system, prompts, round(seconds * FRAME_RATE), kept)
            curves[way] = distance.mean(0).numpy()
            for where, start in (("first", 0), ("last", codes.shape[2] - TEN)):
                heard = judge.listen(ten_seconds(system, prompts, codes, start))
                ten = slice(start, start + TEN)
                cells = {"distance": mean(distance[:, ten].mean(1))}
                cells["told"] = mean(told(system, codes[:, :, ten], prompts, start))
                table[f"{way}: {where} 10 s"] = cells | judged(judge, task, heard, prompts)
            table[f"{way}: last 10 s"]["repeated"] = mean([*map(repeated, codes[:8, 0].numpy())])
            if kept is None:
                places = readings(system.lm, codes.shape[2])
                for where, at in (("readings", places), ("elsewhere", places - places[0] // 3)):
                    table[f"{way}: {where}"] = {"rise": rise(system.codec, codes, at)}
    return table, curves


def play(system, prompts, frames, kept=None):
    """-> codes (R, K, T) and the distance (R, T) at each frame"""
    guided, distances = sample.guided, []

    def watched(logits, guidance):
        p, q = logits[:, 0, :-1].float().softmax(-1).chunk(2)
        distances.append((p - q).abs().sum(-1) / 2)
        return guided(logits, guidance)

    with mock.patch.object(sample, "guided", watched):
        blocks = sample.generate(
            system.lm, system.encoder, prompts, frames, range(len(prompts)), kept=kept,
            **system.sampling,
        )  # fmt: skip
        codes = torch.cat([*tqdm(blocks, "playing", -(-frames // 64), disable=None)], 2)
    return codes, torch.stack(distances, 1)[:, :frames]


@torch.inference_mode()
def told(system, codes, prompts, start):
    """Whether a clip's own prompt is the likeliest of the eight of its group: (R,) of bool. codes:
    (R, K, T), from frame `start` of the piece on, so that the metronome is where it was."""
    right = []
    for i in range(len(prompts)):
        first = min(i // 8 * 8, len(prompts) - 8)
        group = prompts[first : first + 8]
        clips = codes[i : i + 1].expand(len(group), -1, -1)
        text = system.encoder([*group, *[""] * len(group)])
        gain = sample.text_gain(system.lm, text, clips, start)
        right.append(int(gain.argmax()) == i - first)
    return np.array(right)


def repeated(tokens):
    """The longest run in tokens (T,) that was there before: without overlap, in seconds"""
    longest = 0
    for lag in range(1, len(tokens)):
        differs = np.flatnonzero(np.pad(tokens[lag:] != tokens[:-lag], 1, constant_values=True))
        longest = max(longest, min(lag, int(np.diff(differs).max()) - 1))
    return longest / FRAME_RATE


def ten_seconds(system, prompts, codes, start):
    """Yields ten seconds of each sample, from frame `start` on: audio (S,)."""
    before = min(start, 256)  # the refiner may look back
    nothing = torch.empty(system.codec.codebooks, 0, dtype=torch.long)
    for seed, (prompt, clip) in enumerate(zip(prompts, codes)):
        part = clip[:, start - before : start + TEN]
        audio = torch.cat([*system.audio(prompt, seed, [part], nothing)])
        yield audio[before * system.codec.hop :]


def readings(lm, frames):
    """The frames at which `sample.generate` reads the text again."""
    end = sample.played(lm)
    return np.arange(end, frames - 180, end - sample.remembered(lm))


def rise(codec, codes, places):
    """How much bands rise within two frames of each place, at the mean of the bands, in dB."""
    level = codec.from_codes(codes)  # (R, bands, T), dB
    change = level.diff(dim=2).clamp(min=0).mean(1)  # (R, T - 1)
    return mean([row[p - 2 : p + 1].max() for row in change for p in places])


def draw(curves, file):
    """The distance over time, {name: (T,)}; dashed where the text is never read again."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    colours = {}
    for name, values in curves.items():
        model, _, never = name.partition(", never")
        colour = colours.setdefault(model, f"C{len(colours)}")
        smooth = np.convolve(values, np.ones(173) / 173, "valid")  # over two seconds
        seconds = (np.arange(len(smooth)) + 86) / FRAME_RATE
        axes.plot(seconds, smooth, colour, ls="--" if never else "-", label=name)
    axes.set(xlabel="seconds of music", ylabel="distance with and without the text", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file, dpi=120)


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("models", nargs="*", default=[os.path.relpath(sample.SHIPPED)], help="checkpoints [toy/lm]")
    add("--seconds", type=float, default=60.0, help="length of the music [60]")
    add("--count", type=int, default=32, help="held-out prompts [32]")
    add("--name", help="of the table and the figure [words, or words-SECONDS if not 60]")
    args = parser.parse_args(argv)
    check_value("seconds", args.seconds, "[25, 1e9]")
    check_value("count", args.count, "[8, 64]")
    models = {m.removeprefix("out/").removesuffix("/best"): m for m in args.models}
    table, curves = measure(models, args.seconds, args.count)
    about = f"{args.count} held-out prompts, {args.seconds:g} s each. Brackets: 95% intervals."
    name = args.name or ("words" if args.seconds == 60 else f"words-{args.seconds:g}")
    report(name, f"Words and {args.seconds:g} s of music", table, about)
    draw(curves, RESULTS / f"{name}.png")


if __name__ == "__main__":
    entry(main)
