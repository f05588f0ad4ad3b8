"""Does the music do what the words asked? Measured by a listener trained on real clips.

    python evaluate.py                          the newest checkpoint, else the shipped one
    python evaluate.py --checkpoint out/mamba/best

The listener is a small convolutional classifier of genre, lead and mood on the spectrogram that the
first codebook decodes to. It is trained on the toy world's real training clips alone (about two
minutes, kept in out/listener), and its accuracy on held-out real clips is printed above every other
figure: that is the ceiling. Mixtures of two genres are left out, of the prompts as of the real
clips. The tempo is measured without learning, from the autocorrelation of onsets.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import trange

import toy
from codec import FRAME_RATE, load_codec
from data import Clips
from model import entry, generate, load_checkpoint, load_text_encoder, read_config, read_tensors
from sample import newest_checkpoint

FACTORS = {"genre": list(toy.GENRES), "lead": list(toy.LEADS), "mood": list(toy.MOODS)}
LENGTHS = ("words", "sentence", "paragraph")


class Listener(nn.Module):
    """Log-band frames (B, D, T) -> logits for each factor: (B, classes)."""

    def __init__(self, bands=160, width=128):
        super().__init__()
        sizes = [bands, width, width, width, width]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 5, 2) for a, b in zip(sizes, sizes[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in self.convs)
        self.dropout = nn.Dropout(0.2)
        self.heads = nn.ModuleDict({k: nn.Linear(2 * width, len(v)) for k, v in FACTORS.items()})

    def forward(self, bands):
        h = bands / 20  # dB -> about unit variance
        for conv, norm in zip(self.convs, self.norms):
            h = F.gelu(norm(conv(h)))
        h = self.dropout(torch.cat([h.mean(2), h.amax(2)], 1))  # over time
        return {factor: head(h) for factor, head in self.heads.items()}


def train_listener(codec, clips, folder, steps=600, batch=32):
    """The listener of this codec, trained now or found in `folder`."""
    listener, file = Listener(), Path(folder) / "listener.safetensors"
    if file.exists():
        listener.load_state_dict(read_tensors(file))
        return listener.eval()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(listener.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    rng = np.random.default_rng(0)
    for _ in trange(steps, desc="training the listener", disable=None):
        picks = rng.integers(len(clips), size=batch)
        codes = torch.from_numpy(np.stack([clips.codes(i, 0, 862) for i in picks]))
        logits = listener(codec.from_codes(codes))
        truth = {k: labels([clips.rows[i]["factors"] for i in picks], k) for k in FACTORS}
        loss = sum(F.cross_entropy(logits[k], truth[k]) for k in FACTORS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(listener.state_dict(), file)
    return listener.eval()


def labels(factors, key):
    return torch.tensor([FACTORS[key].index(f[key]) for f in factors])


def tempo_of(bands, slowest=50, fastest=220):
    """Log-band frames (D, T) -> beats a minute: the lag at which onsets repeat best.

    Onset strength is the rise of each band, summed; its autocorrelation is read at one to four
    times a candidate's beat, so that a wrong candidate has to be wrong four times.
    """
    rise = bands.diff(dim=1).clamp(min=0).mean(0)
    rise = rise - F.avg_pool1d(rise[None, None], 87, 1, 43, count_include_pad=False)[0, 0]
    spectrum = torch.fft.rfft(rise, n=4 * len(rise))
    correlation = torch.fft.irfft(spectrum.abs() ** 2)[: len(rise)].numpy()
    tempi = np.arange(slowest, fastest, 0.25)
    score = sum(
        np.interp(k * 60 * FRAME_RATE / tempi, np.arange(len(correlation)), correlation)
        for k in (1, 2, 3, 4)
    )
    return float(tempi[score.argmax()])


def same_tempo(asked, heard, tolerance=0.05):
    """Within the tolerance of the tempo asked, of its double or of its half."""
    return any(abs(heard / (asked * octave) - 1) <= tolerance for octave in (0.5, 1, 2))


def judge(listener, codec, codes, factors):
    """-> {factor: right or wrong (B,)}, with "tempo" among them"""
    with torch.inference_mode():
        bands = codec.from_codes(codes[:, :1])
        logits = listener(bands)
    right = {k: (logits[k].argmax(1) == labels(factors, k)).numpy() for k in FACTORS}
    heard = [tempo_of(b) for b in bands]
    right["tempo"] = np.array([same_tempo(f["tempo"], h) for f, h in zip(factors, heard)])
    return right


def held_out_prompts(clips, count, length):
    """Factors of `count` held-out clips of one genre each, every genre about as often as another,
    and captions of this length that name the genre."""
    by_genre = {g: [] for g in toy.GENRES}
    for row in clips.rows:
        if row["factors"]["rhythm"] is None:
            by_genre[row["factors"]["genre"]].append(row["factors"])
    chosen = [f for group in zip(*by_genre.values()) for f in group][:count]
    captions = []
    for i, factors in enumerate(chosen):
        rng = np.random.default_rng([LENGTHS.index(length), i])
        names = toy.GENRES[factors["genre"]].words
        while not any(n in (text := toy.caption(factors, rng, length)).lower() for n in names):
            pass
        captions.append(text)
    return chosen, captions


def follow(checkpoint, count):
    """Prints how often samples of held-out prompts show what was asked."""
    folder = toy.corpus()
    config = read_config(checkpoint)
    codec = load_codec(config["codec"])
    train, valid = (Clips(folder, split, 1, codec.name) for split in ("train", "valid"))
    listener = train_listener(codec, train, "out/listener")
    rows = []
    plain = [i for i, row in enumerate(valid.rows) if row["factors"]["rhythm"] is None]
    real = torch.from_numpy(np.stack([valid.codes(i, 0, 862) for i in plain]))
    right = judge(listener, codec, real, [valid.rows[i]["factors"] for i in plain])
    rows.append(("real clips", right, {k: np.ones(len(v), bool) for k, v in right.items()}))

    lm, encoder = load_checkpoint(checkpoint), load_text_encoder(checkpoint)
    for length in LENGTHS:
        factors, captions = held_out_prompts(valid, count, length)
        blocks = generate(
            lm, encoder, captions, 862, list(range(len(captions))), **config.get("sampling", {})
        )
        bar = trange(-(-862 // 64), desc=f"sampling, {length}", disable=None)
        codes = torch.cat([block for _, block in zip(bar, blocks)], 2)
        right = judge(listener, codec, codes, factors)
        asked = {
            "genre": np.ones(len(factors), bool),
            "lead": mentioned(captions, [toy.LEADS[f["lead"]][3] for f in factors]),
            "mood": mentioned(captions, [toy.MOODS[f["mood"]].words for f in factors]),
            "tempo": np.array([bool(re.search(r"\d+ (bpm|beats)", c, re.I)) for c in captions]),
        }  # fmt: skip
        rows.append((f"{checkpoint}, {length}", right, asked))
    print("\n| clips | " + " | ".join(rows[0][1]) + " |\n|---|" + "---|" * len(rows[0][1]))
    for name, right, asked in rows:
        cells = [f"{right[k][asked[k]].mean():.0%} of {asked[k].sum()}" for k in right]
        print(f"| {name} | " + " | ".join(cells) + " |")


def mentioned(captions, words):
    """Which captions use any of their words."""
    return np.array([any(w in c.lower() for w in ws) for c, ws in zip(captions, words)])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="[the newest in out/, else the one in toy/]")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts a length [64]")
    args = parser.parse_args()
    follow(args.checkpoint or newest_checkpoint(), args.prompts)


if __name__ == "__main__":
    entry(main)
