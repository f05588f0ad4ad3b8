"""The toy codec."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from audio import (
    EDGE,
    FULL_SCALE,
    HOP,
    N_FFT,
    SAMPLE_RATE,
    band_power,
    filterbank,
    istft,
    join,
    overlapped,
    power,
    stft,
    under_another_name,
)


def nearest_entry(vectors, entries):  # (n, 8), (1024, 8) -> (n,)
    half = entries.square().sum(1) / 2  # |v - e|^2 / 2 = |v|^2 / 2 - v.e + |e|^2 / 2
    return torch.cat(
        [torch.addmm(half, v, entries.T, alpha=-1).argmin(1) for v in vectors.split(512)]
    )


def centroids(points, owner, centres):
    """Means (k, 8) of the points (n, 8) that each centre owns; those that own none stay."""
    count = owner.bincount(minlength=len(centres))[:, None]
    total = torch.zeros_like(centres).index_add_(0, owner, points)
    return torch.where(count > 0, total / count.clamp(min=1), centres)


def sticky_codes(vectors, entries, cost):
    """vectors (B, T, 8) -> codes (B, T) that minimise the squared error plus `cost` for each change
    of code, by the Viterbi algorithm. Plain nearest entries hop to and fro between cells that a
    held note lies on the border of, which is noise to a language model: at a cost that raises the
    mel distance by 0.2 dB (4.26 to 4.45, first codebook alone), the share of repeated codes grows
    from 48% to 81% and the bigram entropy halves, 3.0 to 1.5 nats. Blocks bound the memory."""
    codes = []
    for block in vectors.split(2048, dim=1):
        error = entries.square().sum(1) - 2 * block @ entries.T  # (B, t, 1024), up to |v|^2
        total = error[:, 0]  # of the best path that ends in each code
        if codes:
            total = total + cost
            total.scatter_add_(1, codes[-1][:, -1:], total.new_full((len(total), 1), -cost))
        stays, jumps = [], []
        for t in range(1, block.shape[1]):
            cheapest, source = total.min(1, keepdim=True)  # (B, 1)
            stays.append(total <= cheapest + cost)
            jumps.append(source)
            total = torch.minimum(total, cheapest + cost) + error[:, t]
        path = [total.argmin(1, keepdim=True)]
        for stay, source in zip(stays[::-1], jumps[::-1]):
            path.append(torch.where(stay.gather(1, path[-1]), path[-1], source))
        codes.append(torch.cat(path[::-1], 1))
    return torch.cat(codes, 1)


def k_means(points, k, generator, rounds=15):
    """(n, 8) -> (k, 8). Until the last rounds, centres that few points use restart elsewhere."""
    pick = lambda count: points[torch.randint(len(points), (count,), generator=generator)]
    centres = pick(k)
    for i in range(rounds):
        owner = nearest_entry(points, centres)
        centres, count = centroids(points, owner, centres), owner.bincount(minlength=k)
        idle = (count < 0.35 * len(points) / k).nonzero()[:, 0]
        if i < rounds - 4:
            centres[idle] = pick(len(idle))
    return centres


def neighbours(x):  # (B, T, 8) -> (B, T, 24): frames t-1, t, t+1
    x = F.pad(x.mT, (1, 1), mode="replicate").mT
    return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], -1)


def running_phase(magnitude, start=None):
    """(B, T, F) -> phases (B, T, F) of sinusoids that run on: each bin turns at the frequency of
    the nearest spectral peak (single-pass spectrogram inversion, Beauregard et al. 2015). `start`
    (B, F) is the phase at frame 3, if known; else neighbouring bins alternate, as around a peak."""
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
    return phase + ((bins % 2) * math.pi if start is None else start - phase[:, 3])[..., None, :]


class ToyCodec(nn.Module):
    name, sample_rate, hop, code_dim = "toy", SAMPLE_RATE, HOP, 8
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
        filters = filterbank(bands, 300.0, 30.0, 20000.0)
        self.register_buffer("filters", filters, persistent=False)

    @classmethod
    @torch.no_grad()
    def fit(cls, audio_clips, seed=0, **sizes):
        """Clips (any length, 1-D) -> a codec. k-means sees 60,000 frames a level, least squares
        all; every level is fitted to what the rounded (fp16, as stored) levels before it leave."""
        codec, generator = cls(**sizes), torch.Generator().manual_seed(seed)
        clips = (torch.as_tensor(clip, dtype=torch.float32)[None] for clip in audio_clips)
        residual = torch.cat([codec.features(clip)[0] for clip in clips])  # (T of all clips, D)
        rows = max(1, len(residual) // 862)  # of about ten seconds
        residual = residual[: len(residual) // rows * rows].unflatten(0, (rows, -1))  # (B, T, D)
        codec.mean.copy_(residual.mean((0, 1)).half())
        residual -= codec.mean
        for level, (into, entries, out) in enumerate(zip(codec.into, codec.entries, codec.out)):
            flat = residual.flatten(0, 1)
            sample = flat[torch.randperm(len(flat), generator=generator)[:60000]]
            into.copy_(torch.linalg.eigh(sample.T @ sample).eigenvectors[:, -8:].half())
            entries.copy_(k_means(sample @ into, len(entries), generator).half())
            vectors = residual @ into
            for _ in range(2 if level == 0 else 0):  # move the entries to where they are used
                owner = codec._codes(level, vectors).flatten()
                entries.copy_(centroids(vectors.flatten(0, 1), owner, entries).half())
            x = neighbours(entries[codec._codes(level, vectors)]).flatten(0, 1)  # (B T, 24)
            gram = x.T @ x + 1e-5 * len(x) * torch.eye(x.shape[1])  # the ridge: for silent corpora
            out.copy_(torch.linalg.solve(gram, x.T @ flat).half())
            residual -= (x @ out).view_as(residual)
        return codec

    def _codes(self, level, vectors):  # (B, T, 8) -> (B, T)
        if level == 0:
            return sticky_codes(vectors, self.entries[0], self.stickiness)
        return nearest_entry(vectors.flatten(0, 1), self.entries[level]).view(vectors.shape[:2])

    def features(self, audio):  # (B, S) -> (B, T, D), dB
        return 10 * (band_power(audio, self.filters) + self.floor).log10()

    @torch.no_grad()
    def encode(self, audio):
        """audio (B, S) -> codes (B, 9, ceil(S / 512))"""
        residual, codes = self.features(audio) - self.mean, []  # (B, T, D)
        for level in range(self.codebooks):
            codes.append(self._codes(level, residual @ self.into[level]))
            chosen = self.entries[level][codes[-1]]  # (B, T, 8)
            residual = residual - neighbours(chosen) @ self.out[level]
        return torch.stack(codes, 1)

    def vectors(self, codes):
        """codes (B, k, T) -> (B, k, 8, T), the codebook entries"""
        return torch.stack([e[c].mT for e, c in zip(self.entries, codes.unbind(1))], 1)

    def snap(self, vectors, first=0):
        """vectors (B, k, 8, T) of the codebooks from `first` on (from 0) -> codes (B, k, T).

        Each vector takes its nearest entry, after what the levels before have rounded away was
        added to it, as in encoding: rounding each level by itself, vectors that follow a held note
        smoothly would become entries that jump to and fro, and the errors of all levels would add.
        """
        lost, codes = 0, []  # (B, T, D)
        levels = zip(self.into[first:], self.entries[first:], self.out[first:])
        for vector, (into, entries, out) in zip(vectors.unbind(1), levels):
            wanted = vector.mT + lost @ into if codes else vector.mT  # (B, T, 8)
            codes.append(nearest_entry(wanted.flatten(0, 1), entries).view(wanted.shape[:2]))
            lost = lost + neighbours(vector.mT - entries[codes[-1]]) @ out
        return torch.stack(codes, 1)

    def from_codes(self, codes):
        """codes (B, k, T) of the k leading codebooks -> z (B, D, T), dB in each band"""
        z = self.mean
        for vectors, out in zip(self.vectors(codes).unbind(1), self.out):
            z = z + neighbours(vectors.mT) @ out
        return z.mT

    def decode(self, z):
        """z (B, D, T) -> audio (B, 512 T), by the windows of `decode_stream`. Beyond the first
        window the two have the same spectrum, not the same waveform: Griffin-Lim amplifies the
        last digits, and a stream cannot see the frame that follows a window."""
        return torch.cat(list(overlapped(self, [z], lambda z: z)), -1)

    @torch.no_grad()
    def decode_window(self, z, before=None):
        """z (B, D, T) -> audio (B, 512 T); `before` is the audio of its first frames, if known."""
        filters, share = self.filters, self.filters.sum(0).clamp(min=1e-3)  # (D, F), (F,)
        # Bands -> bins: the power that explains the bands, by multiplicative (EM) updates.
        target = (10 ** (z.mT / 10) - self.floor).clamp(min=0) * FULL_SCALE * filters.sum(1)
        missing = lambda bins: (target / (bins @ filters.T).clamp(min=1e-12)) @ filters / share
        bins = (target / filters.sum(1)) @ filters / share  # (B, T, F)
        for _ in range(8):
            bins = bins * missing(bins)
        magnitude = bins.sqrt()

        start = None
        if before is not None:
            start = stft(F.pad(before, (EDGE, EDGE)).unfold(-1, N_FFT, HOP)[:, 3]).angle()
        spectrum, last = torch.polar(magnitude, running_phase(magnitude, start)), None
        for i in range(self.rounds):
            audio = istft(spectrum)
            audio[:, EDGE:-EDGE] = join(before, audio[:, EDGE:-EDGE], self.overlap)
            now = stft(audio.unfold(-1, N_FFT, HOP))  # (B, T, F)
            if i >= self.rounds // 2:  # magnitudes that fit the bands *and* the phase found so far
                magnitude = (power(now) * missing(power(now)).clamp(max=100)).sqrt()
            # Momentum 0.99. As pairs of reals, because complex arithmetic is several times slower.
            pairs = torch.view_as_real(now)  # (B, T, F, 2)
            ahead = pairs if last is None else torch.lerp(last, pairs, 1.99)
            scale = magnitude / (power(torch.view_as_complex(ahead)) + 1e-16).sqrt()
            spectrum, last = torch.view_as_complex(ahead * scale[..., None]), pairs
        return istft(spectrum)[:, EDGE:-EDGE]

    def save(self, folder):
        """Writes model.safetensors (fp16: the values are rounded already) and config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = dict(codebooks=self.codebooks, codebook_size=self.codebook_size)
        config = dict(name=self.name, **sizes, bands=len(self.mean))
        tensors = {key: value.half().contiguous() for key, value in self.state_dict().items()}
        with (
            under_another_name(folder / "model.safetensors") as weights,
            under_another_name(folder / "config.json") as about,
        ):
            save_file(tensors, weights)
            about.write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder):
        folder, cure = Path(folder), "`git checkout -- toy/codec` restores the shipped one"
        try:
            config = json.loads((folder / "config.json").read_text())
            codec = cls(*(config[key] for key in ("codebooks", "codebook_size", "bands")))
            codec.load_state_dict(load_file(folder / "model.safetensors"))
        except FileNotFoundError as error:
            raise ValueError(
                f"no codec in {folder}: {Path(error.filename or folder).name} is missing; {cure}"
            ) from None
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the codec in {folder} is damaged ({reason}); {cure}") from None
        return codec
