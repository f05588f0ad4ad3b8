r"""The toy world's judge: it hears audio and says what it is, and how well words fit it.

Published metrics rest on large networks that were trained on other people's music: OpenL3 for FD,
PaSST for KL, CLAP for CLAP. The judge is all three for the toy world, small enough to ship: a dual
encoder of audio and captions, trained contrastively (CLAP's recipe, arXiv 2206.04769), with heads
that name a clip's factors. It hears waveforms, so anything that makes a sound can be judged.

    audio --hear--> Sound --Ear--> frames (W, D) --mean--> embedding \
                                \-> genre, rhythm, lead, tempo, key, mood     > cosine
    caption --small T5-----------------------------------> embedding /

Three things are listened to, because each shows one kind of factor plainly:
  frames  loudness, movement and peaks of 64 mel bands and 90 semitones, for 1.2 seconds each: who
          plays, how much and how loudly
  chroma  the twelve pitch classes of three registers in each quarter of the clip, which a network
          reads by *circular* convolutions: a key that it knows in C it knows in all twelve
  beat    autocorrelation of the onsets over a logarithmic axis of tempo, where a faster piece is a
          shifted one

Frames are summed up before anything is learned, so it trains in a minute of one core.

It is trained on real clips that nothing else here has ever met (split seed 2 of toy.py), one in
four of them through the codec and back; it never hears generated audio.

    python judge.py          makes toy/judge.safetensors anew (needs fluidsynth)

B clips · S samples · T spectral frames · P pitch frames · W frames that are judged · G points of
the tempo axis · D size of an embedding
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm, trange

from audio import FRAME_RATE, SAMPLE_RATE, band_power, filterbank, under_another_name
from checkpoint import read_tensors
from codec import load_codec
from options import entry
from text import TextEncoder
from toy import band, corpus, songbook, words

FILE = Path(__file__).parent / "judge.safetensors"
HEARD = Path(__file__).parent / "heard.safetensors"
SECONDS = 10.0  # of audio that is judged at once
D = 64

TEMPI = sorted({tempo for genre in songbook.GENRES.values() for tempo in genre.tempo})
FACTORS = {  # what each head chooses among
    "genre": [*songbook.GENRES],
    "rhythm": [*songbook.GENRES],
    "lead": [*songbook.LEADS],
    "tempo": TEMPI,
    "key": [f"{tonic} {mode}" for mode in ("major", "minor") for tonic in songbook.TONICS],
    "mood": [*songbook.MOODS],
}
TAGS = [
    *songbook.GENRES,
    *songbook.LEADS,
    *songbook.MOODS,
    "slow",
    "mid-tempo",
    "fast",
]  # for the zero-shot tags


# ------------------------------------------------------------------------------ what is heard ----


class Sound(NamedTuple):
    frames: Tensor  # (B, W, 436), about unit variance
    chroma: Tensor  # (B, 15, 12), from C
    beat: Tensor  # (B, 12, G)


MEL = filterbank(64, 700.0, 40.0, 16000.0)
LOWEST, QUARTERS = 28, 180  # MIDI note of the lowest pitch bin, E1, and the bins: 7.5 octaves
WINDOW, PITCH_HOP = 8192, 4096  # samples
AXIS = torch.logspace(np.log10(40), np.log10(240), 384)  # of tempo, 0.5% a point


def constant_q():
    """-> (180, 4097): triangles a quarter-tone, or at least one FFT bin, to either side."""
    centres = 440 * 2 ** ((LOWEST - 69) / 12 + np.arange(QUARTERS) / 24)
    bins = np.arange(WINDOW // 2 + 1) * SAMPLE_RATE / WINDOW
    reach = np.maximum(centres * (2 ** (1 / 24) - 1), SAMPLE_RATE / WINDOW)[:, None]
    triangles = np.clip(1 - np.abs(bins - centres[:, None]) / reach, 0, None)
    return torch.from_numpy(triangles / triangles.sum(1, keepdims=True)).float()


PITCHES = constant_q()


def decibels(power):  # of a clip as loud as band.RMS -> about unit variance
    return (10 * (power + 1e-6).log10() + 40) / 15


@torch.no_grad()
def hear(audio) -> Sound:
    """audio (B, S) of at least two seconds -> Sound. All clips are heard at one loudness."""
    audio = audio * (band.RMS / audio.square().mean(1, keepdim=True).sqrt().clamp(min=1e-5))
    mel = decibels(band_power(audio, MEL)).mT  # (B, 64, T)

    half = WINDOW // 2
    pieces = F.pad(audio, (half, half)).unfold(1, WINDOW, PITCH_HOP) * torch.hann_window(WINDOW)
    spectrum = torch.view_as_real(torch.fft.rfft(pieces)).square().sum(-1)  # (B, P, 4097)
    pitch = decibels(spectrum @ PITCHES.T / (WINDOW / 4) ** 2).mT

    # Onset strength of four groups of bands; its autocorrelation at one, two and four beats.
    rise = mel.diff(dim=2).clamp(min=0).unflatten(1, (4, 16)).mean(2)  # (B, 4, T - 1)
    rise = rise - F.avg_pool1d(rise, 87, 1, 43, count_include_pad=False)
    power = torch.fft.rfft(rise, n=2 * rise.shape[2]).abs().square()
    repeats = torch.fft.irfft(power)[..., : rise.shape[2]]  # (B, 4, lags)
    repeats = repeats / repeats[..., :1].clamp(min=1e-6)
    lags = (torch.tensor([[1], [2], [4]]) * 60 * FRAME_RATE / AXIS).clamp(max=rise.shape[2] - 2)
    whole, part = lags.long(), lags % 1
    beat = repeats[..., whole] * (1 - part) + repeats[..., whole + 1] * part  # (B, 4, 3, G)
    return Sound(*summed_up(mel, pitch), 3 * beat.flatten(1, 2))


def summed_up(mel, pitch):
    """mel (B, 64, T), pitch (B, 180, P) -> frames (B, W, 436), chroma (B, 15, 12)"""
    W = mel.shape[2] // 100  # of 1.16 s
    mel = mel[..., : 100 * W].unflatten(2, (W, 100))  # (B, 64, W, 100)
    semitones = torch.maximum(pitch[:, 0::2], pitch[:, 1::2])  # (B, 90, P)
    heard = [
        mel.mean(3), 2 * mel.std(3), mel.amax(3) - 1, 8 * mel.diff(dim=3).clamp(min=0).mean(3),
        F.adaptive_avg_pool1d(semitones, W), F.adaptive_max_pool1d(semitones, W),
    ]  # fmt: skip
    # What stands out from its neighbourhood is a tone; drums do not.
    tones = (pitch - F.avg_pool1d(pitch.mT, 13, 1, 6, count_include_pad=False).mT).clamp(min=0)
    octaves = F.pad(tones[:, 0::2], (0, 0, 0, 6)).unflatten(1, (8, 12))  # (B, 8, 12, P), from E1
    registers = torch.stack([octaves[:, a:b].sum(1) for a, b in ((0, 2), (2, 5), (5, 8))], 1)
    quarters = F.adaptive_avg_pool1d(registers.flatten(1, 2), 4).unflatten(1, (3, 12))
    parts = torch.cat([quarters, quarters.mean(3, True)], 3)  # (B, 3, 12, 5)
    chroma = parts.permute(0, 1, 3, 2).flatten(1, 2).roll(LOWEST % 12, 2)
    return torch.cat(heard, 1).mT, chroma


# ----------------------------------------------------------------------------------- the judge ----


class AroundTheCircle(nn.Module):
    """A convolution over all twelve pitch classes: (B, C, 12) -> (B, C', 12)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer, self.norm = nn.Conv1d(inputs, outputs, 12), nn.BatchNorm1d(outputs)

    def forward(self, h):
        return F.gelu(self.norm(self.layer(torch.cat([h, h[..., :11]], 2))))


class Ear(nn.Module):
    """Sound -> frames (B, W, D) of the embedding, and the logits of each factor (B, choices)."""

    def __init__(self, width=256):
        super().__init__()
        self.timbre = nn.Sequential(
            nn.LayerNorm(436), nn.Linear(436, width), nn.GELU(), nn.Dropout(0.2),
            nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.circle = nn.Sequential(AroundTheCircle(15, 64), AroundTheCircle(64, 64))
        self.key = nn.Linear(64, 2)  # major and minor on each tonic
        self.pulse = nn.Sequential(
            nn.Conv1d(12, 32, 9, padding=4), nn.GELU(), nn.Conv1d(32, 32, 9, padding=4), nn.GELU()
        )
        self.tempo = nn.Conv1d(32, 1, 1)
        names = ("genre", "rhythm", "lead", "mood", "tempo")
        self.heads = nn.ModuleDict({k: nn.Linear(2 * width + 32, len(FACTORS[k])) for k in names})
        self.project = nn.Linear(width + len(TEMPI) + 24, D)

    def forward(self, sound):
        h = self.timbre(sound.frames)  # (B, W, width)
        key = self.key(self.circle(sound.chroma).mT).mT.flatten(1)  # (B, 24)
        pulse = self.pulse(sound.beat)  # (B, 32, G)
        pooled = torch.cat([h.mean(1), h.amax(1), pulse.mean(2)], 1)
        logits = {k: head(pooled) for k, head in self.heads.items()} | {"key": key}
        at = (AXIS[None] - torch.tensor(TEMPI)[:, None]).abs().argmin(1)
        logits["tempo"] = logits["tempo"] + self.tempo(pulse)[:, 0, at]
        known = [logits[k].softmax(1)[:, None].expand(-1, h.shape[1], -1) for k in ("tempo", "key")]
        return self.project(torch.cat([h, *known], 2)), logits


class Judge(nn.Module):
    """The ear and the reader; both give vectors of D numbers."""

    names = dict(fd="FD_toy", kl="KL_toy", clap="CLAP_toy")
    settings = "toy judge, frames of 1.2 s, windows of 10 s every 5 s, mono at one loudness"

    def __init__(self):
        super().__init__()
        self.ear = Ear()
        self.reader = TextEncoder.small(corpus.TOKENIZER.read_text())
        self.say = nn.Linear(self.reader.d_text, D)
        self.scale = nn.Parameter(torch.tensor(2.7))  # log of the softmax's inverse temperature

    def read(self, captions):
        """captions -> embeddings (B, D), unit vectors"""
        return F.normalize(self.say(self.reader.pooled(captions)), dim=1)

    @torch.inference_mode()
    def listen(self, clips):
        """clips: an iterable of audio (S,), of any lengths -> Heard. What is longer than ten
        seconds is heard in windows of ten, one every five, whose logits are averaged."""
        frames, logits = [], []
        for audio in clips:
            heard, named = self.ear(hear(windows(audio, SECONDS, SECONDS / 2)))  # (n, W, D)
            frames.append(heard.flatten(0, 1))
            logits.append({k: v.mean(0) for k, v in named.items()})
        return Heard(frames, {k: torch.stack([one[k] for one in logits]) for k in FACTORS})

    @torch.inference_mode()
    def tags(self, heard):
        """Heard -> the zero-shot tag distribution (N, tags): a softmax over how near each clip is
        to each of the world's words."""
        return (self.scale.exp() * heard.embedding @ self.read(TAGS).T).softmax(1)


class Heard(NamedTuple):
    """What the judge made of N clips."""

    frames: list  # N tensors (W, D)
    logits: dict  # {factor: (N, choices)}

    @property
    def embedding(self):  # (N, D), unit vectors
        return F.normalize(torch.stack([f.mean(0) for f in self.frames]), dim=1)

    def of(self, rows):
        return Heard([self.frames[i] for i in rows], {k: v[rows] for k, v in self.logits.items()})


def windows(audio, seconds, every, rate=SAMPLE_RATE):
    """audio (S,) -> (n, size): whole windows only, but for a clip shorter than one; that is itself
    the only window, filled up to two seconds with silence."""
    size, hop = round(seconds * rate), round(every * rate)
    if len(audio) < size:
        return F.pad(audio, (0, max(0, 2 * rate - len(audio))))[None]
    return audio.unfold(0, size, hop)


def load_judge(file=FILE):
    if not Path(file).exists():
        raise ValueError(f"{file} is missing: `python judge.py` makes it anew")
    judge, tensors = Judge(), read_tensors(file)
    shared, again = (f"reader.encoder.{k}.weight" for k in ("shared", "encoder.embed_tokens"))
    try:
        judge.load_state_dict(tensors | {again: tensors[shared]})
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())[:150]
        raise ValueError(
            f"{file} holds another judge's weights; `python judge.py` makes it anew ({why})"
        ) from None
    return judge.eval().requires_grad_(False)


def same_tempo(asked, heard, tolerance=0.04):
    return abs(heard - asked) <= tolerance * asked


def in_time(asked, heard):
    """The same tempo, or its double or its half: what the foot takes for the beat is a choice."""
    return any(same_tempo(m * asked, heard) for m in (0.5, 1, 2))


def right(logits, factors) -> dict:
    """Whether the heads name what was asked, the tempo to within 4%: {factor: (N,) of bool}"""
    verdicts = {}
    for factor in ("genre", "lead", "tempo", "key", "mood"):
        said = [FACTORS[factor][i] for i in logits[factor].argmax(1)]
        same = same_tempo if factor == "tempo" else lambda asked, heard: asked == heard
        verdicts[factor] = np.array([same(f[factor], one) for f, one in zip(factors, said)])
    return verdicts


# ------------------------------------------------------------------------------------ training ----


def lesson(indices) -> Sound:
    """Clips that only the judge knows, one in four as the codec gives it back, in fp16."""
    torch.set_num_threads(1)
    codec = load_codec("toy")
    codec.rounds = 8  # a quarter of the usual phase search
    audio = torch.from_numpy(np.stack(corpus.play_clips(indices, split_seed=2)))
    audio[::4] = codec.decode(codec.from_codes(codec.encode(audio[::4])))[:, : audio.shape[1]]
    return Sound(*(x.half() for x in hear(audio)))


def answers(factors) -> dict:
    """What each head should say of clips with these factors: {factor: (B,)}"""
    truth = [f | {"rhythm": f["rhythm"] or f["genre"]} for f in factors]
    return {k: torch.tensor([v.index(f[k]) for f in truth]) for k, v in FACTORS.items()}


def train(sounds, factors, steps=1500, batch=64, lr=2e-3, seed=0):
    """Contrast and factors: of `batch` clips and captions each must find its own among all, both
    ways, and every head must name its factor. The text encoder knows the words already and stays
    as it is; three captions a clip are read beforehand."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    judge = Judge()
    judge.reader.load_state_dict(corpus.text_encoder().state_dict())
    judge.reader.requires_grad_(False).eval()
    captions = [words.caption(f, rng) for _ in range(3) for f in factors]
    parts = trange(0, len(captions), 64, desc="reading", disable=None)
    words = torch.cat([judge.reader.pooled(captions[i : i + 64]) for i in parts])  # (3 N, d_text)
    truth = answers(factors)
    learned = [p for p in judge.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    judge.ear.train()
    for _ in (bar := trange(steps, desc="judge", disable=None)):
        picks = torch.from_numpy(rng.choice(len(factors), batch, replace=False))
        frames, logits = judge.ear(blurred(Sound(*(x[picks].float() for x in sounds))))
        heard = F.normalize(frames.mean(1), dim=1)
        told = words[picks + len(factors) * int(rng.integers(3))]
        similar = judge.scale.exp() * heard @ F.normalize(judge.say(told), dim=1).T  # (B, B)
        own = torch.arange(batch)
        loss = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
        for factor, choice in truth.items():
            loss = loss + F.cross_entropy(logits[factor], choice[picks])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 5.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return judge.eval().requires_grad_(False)


def blurred(sound):
    """Another colour of the whole sound, and a little noise: no verdict should hang on one band."""
    colour = 0.2 * torch.randn(len(sound.frames), 1, sound.frames.shape[2])
    return sound._replace(frames=sound.frames + colour + 0.1 * torch.randn_like(sound.frames))


# ------------------------------------------------------------------------------- made and kept ----


def build(clips, workers):
    """Plays the lessons, trains, and writes toy/judge.safetensors; then listens to the corpus's
    held-out clips and writes what it heard to toy/heard.safetensors."""
    parts = [range(i, min(i + 64, clips)) for i in range(0, clips, 64)]
    with ProcessPoolExecutor(workers) as pool:
        heard = [*tqdm(pool.map(lesson, parts), "lessons", len(parts))]
    sounds = Sound(*(torch.cat(x) for x in zip(*heard)))
    factors = [songbook.sample_clip(i, split_seed=2)[0] for i in range(clips)]
    judge = train(sounds, factors)
    save(judge)
    held_out = range(0, 6144, corpus.VALID)  # as many clips as the corpus that ships has
    parts = [held_out[i : i + 64] for i in range(0, len(held_out), 64)]
    played = (torch.from_numpy(clip) for part in parts for clip in corpus.play_clips(part))
    heard = judge.listen(tqdm(played, "held-out clips", len(held_out)))
    record(heard)
    factors = [songbook.sample_clip(i)[0] for i in held_out]
    for factor, values in right(heard.logits, factors).items():
        print(f"{factor:8} {values.mean():6.1%} of {len(values)} held-out clips")


def save(judge):
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    tensors.pop("reader.encoder.encoder.embed_tokens.weight", None)  # shared.weight's other name
    write_tensors(tensors, FILE)


def record(heard):
    tensors = {"frames": torch.stack(heard.frames).half()}
    write_tensors(tensors | {k: v.half() for k, v in heard.logits.items()}, HEARD)


def heard_in_real_clips() -> Heard:
    """What the judge heard in the corpus's held-out clips as they were rendered: audio does not
    ship, so its verdict does."""
    tensors = read_tensors(HEARD)
    frames = tensors.pop("frames").float()
    return Heard([*frames], {k: tensors[k].float() for k in FACTORS})


def write_tensors(tensors, path):
    with under_another_name(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=4352, help="clips to learn from [4352]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that play")
    args = parser.parse_args()
    entry(lambda: build(args.clips, args.workers))
