"""The toy codec: audio <-> nine codes a frame, by signal processing and k-means.

It encodes the power of 160 frequency bands, in dB, by residual quantisation. Each of nine levels
  1. projects the residual on its 8 leading principal components (`into`);
  2. takes the nearest of 1024 vectors (`entries`, from k-means), whose index is the code;
  3. maps the vectors of a frame and its two neighbours back to bands (`out`, by least squares).
Decoding adds up the levels and finds a phase by fast Griffin-Lim (Perraudin et al. 2013).

B batch · T frames · S samples, T = ceil(S / 512) · k leading codebooks · D bands · F = 1025 bins
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import nn

import audio as sound
from audio import HOP, N_FFT
from checkpoint import load_weights

FILE = Path(__file__).with_suffix(".safetensors")  # in fp16, to which its values are rounded


def nearest_entry(vectors, entries):  # (..., 8), (1024, 8) -> (...)
    half = entries.square().sum(1) / 2  # |v - e|^2 / 2 = |v|^2 / 2 - v.e + |e|^2 / 2
    blocks = vectors.flatten(0, -2).split(512)  # small enough for the cache
    codes = [torch.addmm(half, block, entries.T, alpha=-1).argmin(1) for block in blocks]
    return torch.cat(codes).view(vectors.shape[:-1])


def sticky_codes(vectors, entries, cost):
    """vectors (B, T, 8) -> codes (B, T) of least squared error plus `cost` for each change of code,
    by the Viterbi algorithm. Nearest entries would jump back and forth on held notes."""
    total = vectors.new_zeros(len(vectors), len(entries))  # of the best path to each code
    stays, sources = [], []  # for each frame: keep the code, or come from the cheapest one
    for vector in vectors.unbind(1):
        cheapest, source = total.min(1, keepdim=True)  # (B, 1)
        stays.append(total <= cheapest + cost)
        sources.append(source)
        error = entries.square().sum(1) - 2 * vector @ entries.T  # (B, 1024), without |v|^2
        total = torch.minimum(total, cheapest + cost) + error
    path = [total.argmin(1, keepdim=True)]
    for stay, source in zip(stays[:0:-1], sources[:0:-1]):
        path.append(torch.where(stay.gather(1, path[-1]), path[-1], source))
    return torch.cat(path[::-1], 1)


def neighbours(x):  # (B, T, 8) -> (B, T, 24): frames t-1, t, t+1
    x = F.pad(x.mT, (1, 1), mode="replicate").mT
    return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], -1)


def running_phase(magnitude, start=None):
    """(B, T, F) -> phases (B, T, F) of sinusoids that continue from frame to frame, each at the
    frequency of the nearest spectral peak (Beauregard et al. 2015). start: (B, F), the phase at
    frame 3; if None, neighbouring bins alternate."""
    bins = torch.arange(magnitude.shape[-1], device=magnitude.device, dtype=torch.float32)
    padded = F.pad(magnitude, (1, 1))
    left, right = padded[..., :-2], padded[..., 2:]
    peak = (magnitude > left) & (magnitude >= right)
    # A parabola through the peak and its neighbours gives the frequency between the bins.
    curve = (left - 2 * magnitude + right).clamp(max=-1e-9)
    frequency = bins + ((left - right) / curve / 2).clamp(-0.5, 0.5)  # (B, T, F), in bins
    below = torch.where(peak, bins, -1e6).cummax(-1).values
    above = -torch.where(peak, -bins, -1e6).flip(-1).cummax(-1).values.flip(-1)
    closest = torch.where(bins - below <= above - bins, below, above).clamp(0, bins[-1])
    turn = frequency.gather(-1, closest.long()) * (2 * math.pi * HOP / N_FFT)
    phase = turn.remainder(2 * math.pi).cumsum(1)
    offset = (bins % 2) * math.pi if start is None else start - phase[:, 3]
    return phase + offset[..., None, :]


class ToyCodec(nn.Module):
    name, sample_rate, hop, code_dim = "toy", sound.SAMPLE_RATE, HOP, 8
    overlap = 16  # frames that a window of `decode_stream` shares with the one before
    floor = 1e-10  # added to the power: silence is -100 dB
    stickiness = 3000.0  # dB^2, summed over the bands: the cost of a change in the first codebook
    rounds = 32  # of Griffin-Lim

    def __init__(self, codebooks=9, codebook_size=1024, bands=160):
        super().__init__()
        self.codebooks, self.codebook_size = codebooks, codebook_size
        self.register_buffer("mean", torch.zeros(bands))
        self.register_buffer("into", torch.zeros(codebooks, bands, 8))
        self.register_buffer("entries", torch.zeros(codebooks, codebook_size, 8))
        self.register_buffer("out", torch.zeros(codebooks, 3 * 8, bands))  # frames t-1, t, t+1
        filters = sound.filterbank(bands, 300.0, 30.0, 20000.0)
        self.register_buffer("filters", filters, persistent=False)  # (D, F)

    @classmethod
    @torch.no_grad()
    def fit(cls, clips, seed=0, **sizes):
        """Clips (B, S) -> a codec. k-means sees 60,000 frames a level, least squares all. The
        values of each level are rounded to fp16, as stored, before the next is fitted."""
        codec, rng = cls(**sizes), np.random.default_rng(seed)
        residual = torch.cat([codec.features(torch.as_tensor(clip)[None]) for clip in clips])
        codec.mean.copy_(residual.mean((0, 1)).half())
        residual -= codec.mean  # (B, T, D)
        for level, (into, entries, out) in enumerate(zip(codec.into, codec.entries, codec.out)):
            flat = residual.flatten(0, 1)  # (B T, D)
            sample = flat[rng.permutation(len(flat))[:60000]]
            into.copy_(torch.linalg.eigh(sample.T @ sample).eigenvectors[:, -8:].half())
            points = (sample @ into).numpy()
            centres = kmeans2(points, len(entries), 15, minit="points", seed=rng)[0]
            entries.copy_(torch.from_numpy(centres).half())
            x = neighbours(entries[codec._codes(level, residual @ into)]).flatten(0, 1)  # (B T, 24)
            ridge = 1e-5 * len(x) * torch.eye(x.shape[1])  # for silent corpora
            out.copy_(torch.linalg.solve(x.T @ x + ridge, x.T @ flat).half())
            residual -= (x @ out).view_as(residual)
        return codec

    def _codes(self, level, vectors):  # (B, T, 8) -> (B, T)
        if level == 0:
            return sticky_codes(vectors, self.entries[0], self.stickiness)
        return nearest_entry(vectors, self.entries[level])

    def features(self, audio):  # (B, S) -> (B, T, D), dB
        return 10 * (sound.band_power(audio, self.filters) + self.floor).log10()

    @torch.no_grad()
    def encode(self, audio):
        """audio (B, S) -> codes (B, 9, ceil(S / 512))"""
        residual = self.features(audio) - self.mean  # (B, T, D)
        codes = []
        for level, (into, entries, out) in enumerate(zip(self.into, self.entries, self.out)):
            codes.append(self._codes(level, residual @ into))
            residual = residual - neighbours(entries[codes[-1]]) @ out
        return torch.stack(codes, 1)

    def vectors(self, codes):
        """codes (B, k, T) -> (B, k, 8, T), the codebook entries"""
        return torch.stack([e[c].mT for e, c in zip(self.entries, codes.unbind(1))], 1)

    def snap(self, vectors, first=0):
        """vectors (B, k, 8, T) of the codebooks from `first` on (from 0) -> codes (B, k, T). What a
        level rounds away is added to the next one, as in encoding; else all errors would add up."""
        lost = 0  # (B, T, D)
        codes = []
        levels = zip(self.into[first:], self.entries[first:], self.out[first:])
        for vector, (into, entries, out) in zip(vectors.mT.unbind(1), levels):
            wanted = vector + lost @ into if codes else vector  # (B, T, 8)
            codes.append(nearest_entry(wanted, entries))
            lost = lost + neighbours(vector - entries[codes[-1]]) @ out
        return torch.stack(codes, 1)

    def from_codes(self, codes):
        """codes (B, k, T) of the k leading codebooks -> z (B, D, T), dB in each band"""
        z = self.mean
        for vectors, out in zip(self.vectors(codes).unbind(1), self.out):
            z = z + neighbours(vectors.mT) @ out
        return z.mT

    def decode(self, z):
        """z (B, D, T) -> audio (B, 512 T), in windows. A stream differs after its first window,
        because it does not know the frame that follows."""
        return torch.cat(list(sound.overlapped(self, [z], lambda z: z)), -1)

    @torch.no_grad()
    def decode_window(self, z, before=None):
        """z (B, D, T) -> audio (B, 512 T); `before` is the audio of its first frames, if known."""
        filters = self.filters
        share = filters.sum(0).clamp(min=1e-3)  # (F,)
        target = (10 ** (z.mT / 10) - self.floor).clamp(min=0) * sound.FULL_SCALE * filters.sum(1)

        def missing(bins):  # power of the bins (B, T, F) -> the factors that the bands ask for
            return (target / (bins @ filters.T).clamp(min=1e-12)) @ filters / share

        # Bands -> bins: the power that explains the bands, by multiplicative (EM) updates.
        bins = (target / filters.sum(1)) @ filters / share  # (B, T, F)
        for _ in range(8):
            bins = bins * missing(bins)
        magnitude = bins.sqrt()

        edge, start = sound.EDGE, None
        if before is not None:
            start = sound.stft(F.pad(before, (edge, edge)).unfold(-1, N_FFT, HOP)[:, 3]).angle()
        spectrum = torch.polar(magnitude, running_phase(magnitude, start))
        last = None
        for i in range(self.rounds):
            audio = sound.istft(spectrum)
            audio[:, edge:-edge] = sound.join(before, audio[:, edge:-edge], self.overlap)
            now = sound.stft(audio.unfold(-1, N_FFT, HOP))  # (B, T, F)
            if i >= self.rounds // 2:  # magnitudes that fit the bands *and* the phase found so far
                power = sound.power(now)
                magnitude = (power * missing(power).clamp(max=100)).sqrt()
            # Momentum 0.99. As pairs of reals, because complex arithmetic is several times slower.
            pairs = torch.view_as_real(now)  # (B, T, F, 2)
            ahead = pairs if last is None else torch.lerp(last, pairs, 1.99)
            scale = magnitude / (sound.power(torch.view_as_complex(ahead)) + 1e-16).sqrt()
            spectrum = torch.view_as_complex(ahead * scale[..., None])
            last = pairs
        return sound.istft(spectrum)[:, edge:-edge]


def load(file=FILE) -> ToyCodec:
    """The codec that ships. ValueError, in one sentence, if its file is missing or damaged."""
    codec = ToyCodec()
    load_weights(codec, file)
    return codec
