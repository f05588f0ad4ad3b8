"""Does long music keep to its words? With and without reading the text again.

    python -m experiments.words                          the shipped model, 32 prompts, 60 s
    python -m experiments.words --seconds 600 --count 8  ten minutes
    python -m experiments.words out/study/*-0/best       models of your own

Writes results/words.md, .csv and .png. Held-out prompts; all measures are of the same samples:

  distance   of the next-token distributions with and without the prompt (total variation)
  told       the prompt is the likeliest of eight, for the model reading those ten seconds alone
  judged     how the toy judge hears the first and the last ten seconds, refined
  seams      where the text is read, beside other places: the loss of the next second; the flux of
             the spectrum there, and that on the next four beats
  repeated   the longest run of tokens that was there before; beside it, pieces of the composer
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import sample
from audio import FRAME_RATE
from evaluate import RESULTS, clap_scores, mean, report
from options import check_value, entry, new_parser
from toy import corpus, questions
from toy.judge import load_judge

TEN = 861  # frames


def play(system, prompts, frames, kept):
    """-> codes (R, K, T) and the distance (R, T) at each frame"""
    distances = []

    def watched(logits, guidance):
        p, q = logits[:, 0, :-1].float().softmax(-1).chunk(2)
        distances.append((p - q).abs().sum(-1) / 2)
        return guided(logits, guidance)

    guided, sample.guided = sample.guided, watched
    try:
        blocks = sample.generate(
            system.lm, system.encoder, prompts, frames, range(len(prompts)), kept=kept,
            **system.sampling,
        )  # fmt: skip
        blocks = tqdm(blocks, "playing", -(-frames // 64), disable=None, leave=False)
        codes = torch.cat([*blocks], 2)
    finally:
        sample.guided = guided
    return codes, torch.stack(distances, 1)[:, :frames]


@torch.inference_mode()
def loss(system, codes, prompts):
    """Codes (R, K, T), which the model reads from their beginning -> nats (R, T) of codebook 1"""
    logits = system.lm(codes, *system.encoder(prompts))[:, 0]
    return F.cross_entropy(logits.mT, codes[:, 0], reduction="none")


def told(system, codes, prompts):
    """Whether a clip's own prompt is the likeliest of the eight of its group: (R,) of bool"""
    right = []
    for i in range(len(prompts)):
        group = prompts[i // 8 * 8 : i // 8 * 8 + 8]
        nats = loss(system, codes[i : i + 1].expand(len(group), -1, -1), group).mean(1)
        right.append(int(nats.argmin()) == i % 8)
    return np.array(right)


def judged(system, judge, codes, start, prompts, factors):
    """What the judge hears in ten seconds from frame `start` on -> {column: Cell}"""
    before = min(start, 256)  # the refiner may look back
    clips = []
    for seed, (prompt, clip) in enumerate(zip(prompts, codes)):
        clip = clip[:, start - before : start + TEN]
        if system.second:
            clip = torch.cat([*system.refine(prompt, [clip], seed)], 1)
        clips.append(system.codec.decode(system.codec.from_codes(clip[None, :, before:]))[0])
    heard = judge.listen(clips)
    cells = {"CLAP": mean(clap_scores(heard.embedding, judge.read(prompts)))}
    shares = questions.as_asked(heard.logits, factors, prompts)
    return cells | {k: mean(v) for k, v in shares.items() if len(v)}


def seams(system, codes, prompts, kept):
    """Measures at the places where the text was read again, and elsewhere -> two {column: Cell}"""
    trained = system.lm.config.trained_frames
    end = trained - round(sample.EDGE * trained)
    places = [*range(end, codes.shape[2] - 180, end - kept)]
    elsewhere = [p - (trained - kept) // 2 for p in places]
    found = []
    for spots in (places, elsewhere):
        nats, flux, beats = [], [], []
        for i, prompt in enumerate(prompts):
            level = system.codec.from_codes(codes[i : i + 1])[0]  # (bands, T), dB
            rise = level.diff(dim=1, prepend=level[:, :1]).clamp(min=0).mean(0)  # (T,)
            for p in spots:
                nats.append(
                    loss(system, codes[i : i + 1, :, p - kept : p + 86], [prompt])[0, -86:].mean()
                )
                flux.append(rise[p - 1 : p + 2].max())
                if bpm := float(system.encoder([prompt])[2]):
                    at = [round(p + k * 60 / bpm * FRAME_RATE) for k in range(1, 5)]
                    beats += [max(rise[a - 2 : a + 3]) for a in at if a + 3 < len(rise)]
        found.append(dict(zip(("loss", "flux", "on beats"), map(mean, (nats, flux, beats)))))
    return found


def repeated(tokens):
    """The longest run in tokens (T,) that was there before: without overlap, in seconds"""
    longest = 0
    for lag in range(1, len(tokens)):
        differs = np.flatnonzero(np.pad(tokens[lag:] != tokens[:-lag], 1, constant_values=True))
        longest = max(longest, min(lag, int(np.diff(differs).max()) - 1))
    return longest / FRAME_RATE


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("models", nargs="*", default=[str(sample.SHIPPED)], help="checkpoints [toy/lm]")
    add("--seconds", type=float, default=60.0, help="length of the music [60]")
    add("--count", type=int, default=32, help="held-out prompts [32]")
    add("--name", default="words", help="of the results [words]")
    args = parser.parse_args(argv)
    check_value("seconds", args.seconds, "[25, inf)")
    judge = load_judge()
    frames = round(args.seconds * FRAME_RATE)
    table, curves = {}, {}
    for model in args.models:
        system = sample.System(model)
        asked = questions.ask(system.codec, args.count, questions.KINDS[:1])
        prompts, factors = asked["prompts"][questions.KINDS[0]], asked["factors"]
        ways = {"": None, ", never read again": 0} if system.lm.config.prefix else {"": None}
        for way, kept in ways.items():
            name = system.lm.config.variant + way
            codes, distance = play(system, prompts, frames, kept)
            curves[name] = distance.mean(0).numpy()
            for where, start in (("first", 0), ("last", frames - TEN)):
                ten = slice(start, start + TEN)
                cells = {"distance": mean(distance[:, ten].mean(1).numpy())}
                cells["told"] = mean(told(system, codes[:, :, ten], prompts))
                cells |= judged(system, judge, codes, start, prompts, factors)
                table[f"{name}: {where} 10 s"] = cells
            longest = mean(
                [repeated(c.numpy()) for c in tqdm(codes[:8, 0], "repeated", leave=False)]
            )
            table[f"{name}: last 10 s"]["repeated"] = longest
            if system.lm.config.prefix and kept is None:
                kept = sample.remembered(system.lm)
                for where, cells in zip(
                    ("readings", "elsewhere"), seams(system, codes, prompts, kept)
                ):
                    table[f"{name}: {where}"] = cells
    real = corpus.play_clips(range(0, 8 * corpus.VALID, corpus.VALID), seconds=args.seconds)
    real = [system.codec.encode(torch.from_numpy(clip)[None])[0, 0].numpy() for clip in real]
    table["pieces of the composer"] = {"repeated": mean([repeated(piece) for piece in real])}
    about = f"{len(prompts)} held-out prompts, {args.seconds:g} s each. Brackets: 95% intervals."
    report(args.name, f"Words and {args.seconds:g} s of music", table, about)
    draw(curves, RESULTS / f"{args.name}.png")


def draw(curves, file):
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        smooth = np.convolve(values, np.ones(173) / 173, "valid")  # over two seconds
        axes.plot((np.arange(len(smooth)) + 86) / FRAME_RATE, smooth, label=name)
    axes.set(
        xlabel="seconds of music", ylabel="distance of the predictions\nwith and without the text"
    )
    axes.set_ylim(0)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    entry(main)
