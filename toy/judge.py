r"""The toy world's judge: it listens to audio, names its factors, and says how well words fit it.

It does what OpenL3 (FD), PaSST (KL) and CLAP do for real music: an encoder of audio and one of
captions, trained by contrast (as CLAP, arXiv 2206.04769), with a head for each factor. It learns
from clips of its own and never hears generated audio.

    audio --hear--> Sound --Ear--> frames (W, D) --mean--> embedding \
                                \-> genre, rhythm, lead, tempo, key, mood     > cosine
    caption --small T5-----------------------------------> embedding /

B clips · S samples · T spectral frames · P pitch frames · W judged frames · G points of the tempo
axis · D size of an embedding
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from audio import FRAME_RATE, SAMPLE_RATE, band_power, filterbank, power
from checkpoint import load_weights, read_tensors, write_tensors
from codec import load_codec
from toy import corpus
from toy.songbook import GENRES, LEADS, MOODS, RMS, TEMPI, TONICS, sample_clip
from toy.words import caption

FILE = corpus.HERE / "judge.safetensors"
REAL = corpus.HERE / "heard.safetensors"
D = 64
FACTORS = {  # what each head chooses from
    "genre": [*GENRES], "rhythm": [*GENRES], "lead": [*LEADS], "tempo": TEMPI, "mood": [*MOODS],
    "key": [f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS],
}  # fmt: skip
TAGS = [*GENRES, *LEADS, *MOODS, "slow", "mid-tempo", "fast"]

MEL = filterbank(64, 700.0, 40.0, 16000.0)
AXIS = torch.logspace(np.log10(40), np.log10(240), 384)  # (G,) of tempo, 0.5% a point
LOWEST, WINDOW = 28, 8192  # the lowest pitch, E1, as a MIDI note; samples of a pitch frame
# 180 triangles, a quarter-tone apart, to either side a quarter-tone wide or at least one FFT bin.
_CENTRES = 440 * 2 ** ((LOWEST - 69) / 12 + np.arange(180)[:, None] / 24)  # (180, 1), Hz
_REACH = np.maximum(_CENTRES * (2 ** (1 / 24) - 1), SAMPLE_RATE / WINDOW)
_TRIANGLES = 1 - np.abs(np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE) - _CENTRES) / _REACH
_TRIANGLES = torch.from_numpy(_TRIANGLES).clamp(min=0).float()
PITCHES = _TRIANGLES / _TRIANGLES.sum(1, keepdim=True)  # (180, 4097)


class Sound(NamedTuple):
    """What the judge looks at. Each part shows one kind of factor plainly."""

    frames: Tensor  # (B, W, 436), mel bands and semitones in 1.2 s: who plays, how loud, how much
    chroma: Tensor  # (B, 15, 12), pitch classes from C, in registers and quarters: the key
    beat: Tensor  # (B, 12, G), how much the onsets repeat at each tempo


@torch.no_grad()
def hear(audio) -> Sound:
    """audio (B, S) of at least two seconds -> Sound. Loudness is made the same for all clips."""
    level = audio.square().mean(1, keepdim=True).sqrt().clamp(min=1e-5)
    audio = audio * (RMS / level)
    decibels = lambda power: (10 * (power + 1e-6).log10() + 40) / 15  # of about unit variance
    mel = decibels(band_power(audio, MEL)).mT  # (B, 64, T)
    padded = F.pad(audio, (WINDOW // 2, WINDOW // 2))
    spectrum = torch.fft.rfft(padded.unfold(1, WINDOW, WINDOW // 2) * torch.hann_window(WINDOW))
    pitch = decibels(power(spectrum) @ PITCHES.T / (WINDOW / 4) ** 2).mT  # (B, 180, P)

    W = mel.shape[2] // 100  # of 1.16 s
    parts = mel[..., : 100 * W].unflatten(2, (W, 100))  # (B, 64, W, 100)
    semitones = torch.maximum(pitch[:, 0::2], pitch[:, 1::2])  # (B, 90, P)
    frames = [
        parts.mean(3), 2 * parts.std(3), parts.amax(3) - 1,
        8 * parts.diff(dim=3).clamp(min=0).mean(3),
        F.adaptive_avg_pool1d(semitones, W), F.adaptive_max_pool1d(semitones, W),
    ]  # fmt: skip

    # What is louder than its neighbourhood is a tone; drums are not. Three registers of octaves
    # from E1, in the four quarters of the clip and in the whole.
    tones = (pitch - F.avg_pool1d(pitch.mT, 13, 1, 6, count_include_pad=False).mT).clamp(min=0)
    octaves = F.pad(tones[:, 0::2], (0, 0, 0, 6)).unflatten(1, (8, 12))  # (B, 8, 12, P)
    registers = torch.stack([octaves[:, a:b].sum(1) for a, b in ((0, 2), (2, 5), (5, 8))], 1)
    quarters = F.adaptive_avg_pool1d(registers.flatten(1, 2), 4).unflatten(1, (3, 12))
    chroma = torch.cat([quarters, quarters.mean(3, True)], 3)  # (B, 3, 12, 5)
    chroma = chroma.mT.flatten(1, 2).roll(LOWEST % 12, 2)

    # How much the onsets in four groups of bands repeat after one, two and four beats.
    rise = mel.diff(dim=2).clamp(min=0).unflatten(1, (4, 16)).mean(2)  # (B, 4, T - 1)
    rise = rise - F.avg_pool1d(rise, 87, 1, 43, count_include_pad=False)
    size = rise.shape[2]
    repeats = torch.fft.irfft(torch.fft.rfft(rise, n=2 * size).abs().square())[..., :size]
    repeats = repeats / repeats[..., :1].clamp(min=1e-6)  # (B, 4, lags)
    lags = (torch.tensor([[1], [2], [4]]) * 60 * FRAME_RATE / AXIS).clamp(max=size - 2)
    whole, part = lags.long(), lags % 1
    beat = repeats[..., whole] * (1 - part) + repeats[..., whole + 1] * part  # (B, 4, 3, G)
    return Sound(torch.cat(frames, 1).mT, chroma, 3 * beat.flatten(1, 2))


class Ear(nn.Module):
    """Sound -> frames (B, W, D) of the embedding, and the logits of each factor (B, choices)."""

    def __init__(self, width=256):
        super().__init__()
        self.timbre = nn.Sequential(
            nn.LayerNorm(436), nn.Linear(436, width), nn.GELU(), nn.Dropout(0.2),
            nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2),
        )  # fmt: skip
        around = dict(padding="same", padding_mode="circular")  # the twelve pitch classes
        self.key = nn.Sequential(
            nn.Conv1d(15, 64, 12, **around), nn.BatchNorm1d(64), nn.GELU(),
            nn.Conv1d(64, 64, 12, **around), nn.BatchNorm1d(64), nn.GELU(),
            nn.Conv1d(64, 2, 1),  # major and minor on each tonic
        )  # fmt: skip
        self.pulse = nn.Sequential(
            nn.Conv1d(12, 32, 9, padding=4), nn.GELU(), nn.Conv1d(32, 32, 9, padding=4), nn.GELU()
        )
        self.tempo = nn.Conv1d(32, 1, 1)
        sizes = {k: len(choices) for k, choices in FACTORS.items() if k != "key"}
        self.heads = nn.ModuleDict({k: nn.Linear(2 * width + 32, n) for k, n in sizes.items()})
        self.project = nn.Linear(width + len(TEMPI) + 24, D)

    def forward(self, sound):
        h = self.timbre(sound.frames)  # (B, W, width)
        pulse = self.pulse(sound.beat)  # (B, 32, G)
        pooled = torch.cat([h.mean(1), h.amax(1), pulse.mean(2)], 1)
        logits = {k: head(pooled) for k, head in self.heads.items()}
        logits["key"] = self.key(sound.chroma).flatten(1)  # (B, 24)
        at = (AXIS[None] - torch.tensor(TEMPI)[:, None]).abs().argmin(1)
        logits["tempo"] = logits["tempo"] + self.tempo(pulse)[:, 0, at]
        known = [logits[k].softmax(1)[:, None].expand(-1, h.shape[1], -1) for k in ("tempo", "key")]
        return self.project(torch.cat([h, *known], 2)), logits


class Heard(NamedTuple):
    """What the judge heard in N clips."""

    frames: list  # N tensors (W, D)
    logits: dict  # {factor: (N, choices)}

    @property
    def embedding(self):  # (N, D), unit vectors
        return F.normalize(torch.stack([f.mean(0) for f in self.frames]), dim=1)

    def of(self, rows):
        return Heard([self.frames[i] for i in rows], {k: v[rows] for k, v in self.logits.items()})


class Judge(nn.Module):
    names = dict(fd="FD_toy", kl="KL_toy", clap="CLAP_toy")
    settings = "toy judge, frames of 1.2 s, windows of 10 s every 5 s, mono at one loudness"

    def __init__(self):
        super().__init__()
        self.ear = Ear()
        self.reader = corpus.text_encoder()
        self.say = nn.Linear(self.reader.d_text, D)
        self.scale = nn.Parameter(torch.tensor(2.7))  # log of the softmax's inverse temperature

    def read(self, captions):
        """captions -> embeddings (B, D), unit vectors"""
        return F.normalize(self.say(self.reader.pooled(captions)), dim=1)

    @torch.inference_mode()
    def listen(self, clips) -> Heard:
        """clips: an iterable of audio (S,). More than ten seconds are heard in windows of ten, one
        every five; their logits are averaged."""
        heard = [self.ear(hear(windows(audio, 10, 5))) for audio in clips]
        logits = {k: torch.stack([named[k].mean(0) for _, named in heard]) for k in FACTORS}
        return Heard([frames.flatten(0, 1) for frames, _ in heard], logits)  # (n W, D)

    @torch.inference_mode()
    def tags(self, heard):
        """Heard -> (N, tags): a softmax over the cosines of each clip with each word of TAGS."""
        return (self.scale.exp() * heard.embedding @ self.read(TAGS).T).softmax(1)


def windows(audio, seconds, every, rate=SAMPLE_RATE):
    """audio (S,) -> (n, size), whole windows only. A shorter clip is the only window; it is padded
    with silence to two seconds."""
    size, hop = round(seconds * rate), round(every * rate)
    if len(audio) < size:
        return F.pad(audio, (0, max(0, 2 * rate - len(audio))))[None]
    return audio.unfold(0, size, hop)


def load_judge() -> Judge:
    """The trained judge. ValueError, in one sentence, if its file is missing or another judge's."""
    judge = Judge()
    load_weights(judge, FILE)
    return judge.eval().requires_grad_(False)


def heard_in_real_clips() -> Heard:
    """What the judge heard in the corpus's held-out clips. Their audio does not ship."""
    tensors = {k: v.float() for k, v in read_tensors(REAL).items()}
    return Heard([*tensors["frames"]], {k: tensors[k] for k in FACTORS})


# -------------------------------------------------------------------------------- training ----


def build(clips=4352) -> Heard:
    """Trains the judge and writes toy/judge.safetensors. Listens to the corpus's held-out clips and
    writes toy/heard.safetensors."""
    made = corpus.in_processes(play_and_hear, range(clips), "clips")
    sounds = Sound(*(torch.cat(part) for part in zip(*(sound for _, sound in made))))
    judge = train(sounds, [sample_clip(i, split_seed=2)[0] for i in range(clips)])
    write_tensors(FILE, judge.state_dict(), dtype=torch.half)

    held_out = range(0, 6144, corpus.VALID)  # as many clips as the corpus that ships has
    made = corpus.in_processes(corpus.play_clips, held_out, "held-out clips")
    heard = judge.listen(torch.from_numpy(clip) for _, played in made for clip in played)
    write_tensors(REAL, {"frames": torch.stack(heard.frames)} | heard.logits, dtype=torch.half)
    return heard


def play_and_hear(indices) -> Sound:
    """The judge's own clips, in fp16; every fourth is played through the codec."""
    torch.set_num_threads(1)
    codec = load_codec("toy")
    codec.rounds = 8  # a quarter of the usual phase search
    audio = torch.from_numpy(np.stack(corpus.play_clips(indices, split_seed=2)))
    audio[::4] = codec.decode(codec.from_codes(codec.encode(audio[::4])))[:, : audio.shape[1]]
    return Sound(*(x.half() for x in hear(audio)))


def targets(factors) -> dict:
    """Factors of N clips -> {factor: (N,), the right choices}."""
    factors = [f | {"rhythm": f["rhythm"] or f["genre"]} for f in factors]
    return {k: torch.tensor([v.index(f[k]) for f in factors]) for k, v in FACTORS.items()}


def train(sounds, factors, steps=1500, batch=64, lr=2e-3):
    """Each clip of a batch must find its own caption, each caption its clip, each head its factor.
    The text encoder stays as it is."""
    torch.manual_seed(0)
    rng, right, judge = np.random.default_rng(0), targets(factors), Judge()
    judge.reader.requires_grad_(False).eval()

    def loss():
        picks = torch.from_numpy(rng.choice(len(factors), batch, replace=False))
        sound = Sound(*(x[picks].float() for x in sounds))
        # Another equaliser and a little noise, so that no head relies on one band.
        colour = 0.2 * torch.randn(batch, 1, sound.frames.shape[2])
        frames = sound.frames + colour + 0.1 * torch.randn_like(sound.frames)
        frames, logits = judge.ear(sound._replace(frames=frames))
        heard = F.normalize(frames.mean(1), dim=1)
        read = judge.read([caption(factors[i], rng) for i in picks])
        similar = judge.scale.exp() * heard @ read.T  # (B, B)
        own = torch.arange(batch)
        total = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
        return total + sum(F.cross_entropy(logits[k], v[picks]) for k, v in right.items())

    learned = [p for p in judge.parameters() if p.requires_grad]
    minimize(loss, learned, steps, lr, "judge", weight_decay=0.05, max_norm=5.0)
    return judge.eval()


def minimize(loss, parameters, steps, lr, title, weight_decay=0.01, max_norm=1.0):
    """AdamW on a one-cycle schedule. loss() draws a batch and returns its loss."""
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    bar = trange(steps, desc=title, disable=None)
    for _ in bar:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.2f}", refresh=False)
