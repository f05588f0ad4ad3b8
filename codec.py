"""The codec: between audio and the table of integers that the language models write.

Ten seconds of audio become codes (9, 862): nine residual codebooks, 86.13 frames a second. The
first codebook is a sketch of a frame's spectrum (loudness, timbre, rhythm), and each further one
describes what those before it have missed. There are two codecs with one interface:

  toy   made here, in a minute, from nothing but signal processing and k-means; ships in toy/codec
  dac   the paper's: Descript's neural codec (arXiv 2306.06546), weights downloaded on first use

How the toy codec works. It hears what a spectrogram shows: the power in `bands` frequency bands, in
dB, for each frame of 512 samples. Encoding is residual quantisation; a level
  1. projects the residual on its 8 leading principal components (`into`),
  2. takes the nearest of 1024 vectors found by k-means (`entries`), whose index is the code; the
     first level changes its code only where that pays (`sticky_codes`), to be easy to model,
  3. maps the vectors of a frame and its two neighbours back to bands (`out`, least squares), which
     smooths the quantisation noise over time, and leaves the rest to the next level.
Decoding sums what the levels say, spreads bands over STFT bins, and finds a phase by fast
Griffin-Lim (Perraudin et al. 2013), starting from sinusoids that run on from frame to frame.

Long audio is decoded window by window (`decode_stream`). A window starts on the last frames of the
one before, whose audio it is made to continue, so memory does not grow and no seam is heard.

  B batch · T frames · S samples, T = ceil(S / 512) · k leading codebooks · D bands · F = 1025 bins
"""

import json
import math
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

SAMPLE_RATE = 44100
HOP = 512
FRAME_RATE = SAMPLE_RATE / HOP  # 86.13 frames a second
N_FFT = 4 * HOP
STEP = 128  # frames (1.5 s) that a window of `decode_stream` adds
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}

# ------------------------------------------------------------------------------ spectrograms ----

EDGE = (N_FFT - HOP) // 2  # frame t is the window centred on samples 512 t ... 512 t + 511
HANN = torch.hann_window(N_FFT)
FULL_SCALE = float(HANN.sum() / 2) ** 2  # power in the bin of a sine of amplitude 1: 0 dB


def frames(audio):  # (B, S) -> (B, T, 2048), a view
    length = -(-audio.shape[-1] // HOP) * HOP
    return F.pad(audio, (EDGE, EDGE + length - audio.shape[-1])).unfold(-1, N_FFT, HOP)


def stft(frames):  # (B, T, 2048) -> (B, T, F) complex
    return torch.fft.rfft(frames * HANN.to(frames.device))


def power(spectrum):  # |spectrum|^2; abs() would take a slow square root to be squared again
    return spectrum.real.square() + spectrum.imag.square()


def istft(spectrum):  # (B, T, F) complex -> (B, EDGE + 512 T + EDGE), least squares
    T, hann = spectrum.shape[1], HANN.to(spectrum.device)
    pieces = (torch.fft.irfft(spectrum, n=N_FFT) * hann).unflatten(-1, (4, HOP))  # (B, T, 4, 512)
    weights = hann.square().view(4, HOP)
    total, weight = pieces.new_zeros(len(pieces), T + 3, HOP), pieces.new_zeros(T + 3, HOP)
    for i in range(4):
        total[:, i : i + T] += pieces[:, :, i]
        weight[i : i + T] += weights[i]
    return (total / weight.clamp(min=1e-3)).flatten(1)


def filterbank(bands, corner, low, high):
    """-> (bands, F) triangles with peak 1, evenly spaced on the scale log(1 + f / corner), which is
    linear below the corner and logarithmic above; 700 Hz is the mel scale (HTK's). A slope is at
    least one bin wide, so that no band is empty."""
    scale = np.linspace(np.log1p(low / corner), np.log1p(high / corner), bands + 2)
    edges = corner * np.expm1(scale)
    bin_width = SAMPLE_RATE / N_FFT
    offset = np.arange(N_FFT // 2 + 1) * bin_width - edges[1:-1, None]  # (bands, F), Hz
    slope = np.maximum(np.diff(edges), bin_width)[:, None]
    triangles = 1 + np.minimum(offset / slope[:-1], -offset / slope[1:])
    return torch.from_numpy(triangles).clamp(min=0).float()


def band_power(audio, filters):
    """(B, S) -> (B, T, D) mean power of each band, a sine of amplitude 1 being about 1. Blocks of
    frames stay in the cache, and long audio needs little memory."""
    filters = filters / filters.sum(1, keepdim=True) / FULL_SCALE
    return torch.cat([power(stft(f)) @ filters.T for f in frames(audio).split(128, dim=1)], 1)


def mel_spectrogram(audio, n_mels=128):
    """audio (B, S) -> (B, n_mels, T) in dB: mean power in each of `n_mels` triangles on the mel
    scale from 0 to 22050 Hz, Hann window of 2048, hop 512; 0 dB: a full-scale sine, -100:
    silence."""
    power = band_power(audio, filterbank(n_mels, 700.0, 0.0, SAMPLE_RATE / 2).to(audio.device))
    return 10 * power.clamp(min=1e-10).log10().transpose(1, 2)


def mel_distance(reference, audio):
    """Mean absolute difference in dB of the mel spectrograms of two batches (B, S), cut to the
    shorter one; both are clamped at 80 dB below the maximum of the *reference* clip, so a wrong
    loudness counts, and what is inaudible beside the music does not."""
    length = min(reference.shape[-1], audio.shape[-1])
    a, b = (mel_spectrogram(x[..., :length]) for x in (reference, audio))
    floor = a.amax((1, 2), keepdim=True) - 80
    return float((a.maximum(floor) - b.maximum(floor)).abs().mean())


class Picture:
    """A mel-spectrogram of audio that passes by: below 3,000 columns, whatever its length."""

    def __init__(self, samples):
        self.pool = max(1, samples // HOP // 1500)  # frames a column
        # One table made beforehand: small pieces kept between large ones that come and go would
        # leave holes that nothing fits, and memory would grow with the length after all.
        self.mel = torch.zeros(128, 2 + samples // HOP // self.pool, dtype=torch.half)
        self.columns, self.rest = 0, torch.zeros(0)

    def watch(self, chunks):
        for chunk in chunks:
            self._add(torch.cat([self.rest, chunk]))
            yield chunk

    def _add(self, audio):
        step = HOP * self.pool
        whole = len(audio) // step * step
        if whole >= N_FFT:
            mel = mel_spectrogram(audio[None, :whole])[0]  # (128, whole / 512)
            columns = mel.unflatten(1, (-1, self.pool)).mean(2)
            self.mel[:, self.columns : self.columns + columns.shape[1]] = columns
            self.columns += columns.shape[1]
            audio = audio[whole:]
        self.rest = audio

    def save(self, path, title, sample_rate):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        mel = self.mel[:, : max(1, self.columns)].float().numpy()
        seconds = mel.shape[1] * self.pool * HOP / sample_rate
        figure, axis = plt.subplots(figsize=(10, 3.5))
        image = axis.imshow(
            mel, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, len(mel)),
            vmin=mel.max() - 80,
        )  # fmt: skip
        axis.set(title=title.replace("$", r"\$"), xlabel="seconds", ylabel="mel band")
        figure.colorbar(image, label="dB")
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


# ----------------------------------------------------------------------------- the toy codec ----


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


# ----------------------------------------------------------------------- audio of any length ----


def join(before, audio, overlap):
    """Cross-fades from `before` (B, 512 overlap) to `audio` within four frames about the middle of
    the overlap: sooner the new audio lacks what went before, later the old lacks what follows."""
    if before is None:
        return audio
    length = min(overlap * HOP, audio.shape[-1])
    ramp = torch.arange(length, device=audio.device)
    weight = ((overlap / 2 + 2) * HOP - ramp).div(4 * HOP).clamp(0, 1)
    head = torch.lerp(audio[:, :length], before[:, :length], weight)
    return torch.cat([head, audio[:, length:]], -1)


@torch.no_grad()
def overlapped(codec, pieces, to_z):
    """Pieces (B, ..., t) of codes or z, cut anywhere -> audio (B, samples), a window at a time. The
    windows depend on the total only, so however the pieces are cut, the audio is the same."""
    held, before, window = None, None, STEP + codec.overlap
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], -1)
        while held.shape[-1] > window:
            audio = codec.decode_window(to_z(held[..., :window]), before)
            audio = join(before, audio, codec.overlap)
            yield audio[:, : STEP * HOP]
            held, before = held[..., STEP:], audio[:, STEP * HOP :]
    if held is not None and held.shape[-1]:
        yield join(before, codec.decode_window(to_z(held), before), codec.overlap)


def decode_stream(codec, code_chunks):
    """An iterable of codes (k, t), of any sizes -> yields audio (samples,), 1.5 s at a time, in
    constant memory. The same codes give the same bytes, however they are cut into chunks."""
    for audio in overlapped(codec, (chunk[None] for chunk in code_chunks), codec.from_codes):
        yield audio[0]


# ------------------------------------------------------------------------- the paper's codec ----


class DACCodec(nn.Module):
    """DAC behind the same interface. `model` is dac.DAC or transformers' DacModel: they name their
    parts alike. Codes are the same as theirs; `decode` of long audio goes window by window."""

    name, sample_rate, hop = "dac", SAMPLE_RATE, HOP
    overlap = 32  # frames: the decoder's receptive field is some ten frames to either side

    def __init__(self, model):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.quantizers = model.quantizer.quantizers
        self.codebooks = len(self.quantizers)
        self.codebook_size, self.code_dim = self.quantizers[0].codebook.weight.shape

    @torch.no_grad()
    def encode(self, audio):  # (B, S) -> (B, 9, T)
        audio = F.pad(audio, (0, -audio.shape[-1] % HOP))
        residual, codes = self.model.encoder(audio[:, None]), []  # (B, hidden, T)
        for quantizer in self.quantizers:
            codes.append(self._nearest(quantizer, quantizer.in_proj(residual)))
            residual = residual - quantizer.out_proj(self._entry(quantizer, codes[-1]))
        return torch.stack(codes, 1)

    def _entry(self, quantizer, code):  # (B, T) -> (B, 8, T)
        return F.embedding(code, quantizer.codebook.weight).mT

    def vectors(self, codes):  # (B, k, T) -> (B, k, 8, T)
        pairs = zip(self.quantizers, codes.unbind(1))
        return torch.stack([self._entry(quantizer, code) for quantizer, code in pairs], 1)

    def _nearest(self, quantizer, vector):  # (B, 8, T) -> (B, T); DAC compares directions
        entries = F.normalize(quantizer.codebook.weight)
        return (entries @ F.normalize(vector, dim=1)).argmax(1)

    @torch.no_grad()
    def snap(self, vectors, first=0):  # (B, k, 8, T) -> (B, k, T), as the toy codec does it
        linear = lambda layer, v: layer(v) - layer.bias[:, None]  # differences have no bias
        lost, codes = 0, []  # (B, hidden, T)
        for vector, quantizer in zip(vectors.unbind(1), self.quantizers[first:]):
            wanted = vector + linear(quantizer.in_proj, lost) if codes else vector
            codes.append(self._nearest(quantizer, wanted))
            error = vector - self._entry(quantizer, codes[-1])
            lost = lost + linear(quantizer.out_proj, error)
        return torch.stack(codes, 1)

    @torch.no_grad()
    def from_codes(self, codes):  # (B, k, T) -> (B, hidden, T)
        pairs = zip(self.quantizers, self.vectors(codes).unbind(1))
        return sum(quantizer.out_proj(vectors) for quantizer, vectors in pairs)

    def decode(self, z):  # (B, hidden, T) -> (B, 512 T)
        return torch.cat(list(overlapped(self, [z], lambda z: z)), -1)

    @torch.no_grad()
    def decode_window(self, z, before=None):  # needs no `before`: the overlap holds the context
        return self.model.decoder(z)[:, 0]


def load_codec(name="toy", folder=None):
    """ "toy" from the repository or from `folder`; "dac" from the net, or from a `folder` with
    Hugging Face's copy."""
    if name == "toy":
        return ToyCodec.load(folder or Path(__file__).parent / "toy" / "codec")
    if name != "dac":
        raise ValueError(f"unknown codec {name!r}: choose toy or dac")
    try:
        if folder is None:
            import dac  # descript-audio-codec; with a broken torchaudio this is not an ImportError

            return DACCodec(dac.DAC.load(str(dac.utils.download("44khz"))))
    except (ImportError, OSError, RuntimeError):
        pass  # the same weights through transformers
    from transformers import DacModel

    try:
        return DACCodec(DacModel.from_pretrained(folder or "descript/dac_44khz"))
    except OSError:
        raise ValueError(
            f"no DAC weights in {folder or 'huggingface.co/descript/dac_44khz'}: download its"
            " config.json and model.safetensors from there and give their folder as `folder`"
        ) from None


# ------------------------------------------------------------------------------- audio files ----


def read_audio(path):
    """Any file that libsndfile or ffmpeg reads -> (1, S) float32, mono, 44.1 kHz. ValueError, one
    sentence that begins with the path, if it is none, or holds nothing."""
    return torch.from_numpy(np.concatenate(list(audio_blocks(path))))[None]


def audio_blocks(path):
    """The same audio in pieces (s,) of a few seconds, so that a file of hours takes no more memory
    than one of seconds. Whole files and pieces give the same samples."""
    import soundfile

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        file = soundfile.SoundFile(os.fsencode(path))  # a name need not be text
        blocks = resampled((b.mean(1) for b in _read(file)), file.samplerate)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        reason = getattr(error, "error_string", str(error))
        blocks = _ffmpeg(path, f"{path} is not readable audio: {reason}")
    samples = 0
    try:
        for block in blocks:
            if not np.isfinite(block).all():
                raise ValueError(f"{path} holds samples that are not numbers")
            samples += len(block)
            yield block
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path} is not readable audio: {error.error_string}") from None
    if not samples:
        raise ValueError(f"{path} holds no samples")


def _read(file):  # -> blocks (s, channels)
    with file:
        yield from file.blocks(1 << 18, dtype="float32", always_2d=True)


def _ffmpeg(path, reason):
    """What libsndfile cannot read, ffmpeg perhaps can (m4a, wma, ...) -> blocks (s,)."""
    if not shutil.which("ffmpeg"):
        raise ValueError(f"{reason} (ffmpeg, which reads more formats, is not installed)")
    command = ["ffmpeg", "-v", "quiet", "-nostdin", "-i", f"file:{path}", "-map", "0:a:0"]
    # The mean of the channels, as elsewhere: left to itself it would keep their power.
    command += ["-ac", "1", "-rematrix_maxval", "1.0", "-ar", str(SAMPLE_RATE), "-f", "f32le", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            while piece := process.stdout.read(4 << 18):
                yield np.frombuffer(piece, "<f4")
        finally:
            process.kill()  # does nothing to one that has ended
    if process.returncode:
        raise ValueError(reason)


def resampled(blocks, rate):
    """Blocks (s,) at `rate` Hz -> blocks at 44.1 kHz, as scipy's resample_poly of the whole: each
    is filtered together with as much of its neighbours as the filter reaches."""
    from scipy.signal import firwin, resample_poly

    if not 1000 <= rate <= 1_000_000:
        raise RuntimeError(f"its sampling rate is said to be {rate} Hz")
    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    if up == down:
        return blocks
    reach = 10 * max(up, down)  # taps to each side, at up * rate
    taps = firwin(2 * reach + 1, 1 / max(up, down), window=("kaiser", 5.0)).astype(np.float32)
    context = -(-(reach // up + 1) // down) * down  # samples to each side; whole periods

    def stream():
        held = np.zeros(context, np.float32)  # the last `context` samples done, and what follows
        for block in blocks:
            held = np.concatenate([held, block])
            ready = (len(held) - 2 * context) // down * down
            if ready > 0:
                piece = resample_poly(held[: ready + 2 * context], up, down, window=taps)
                yield piece[context * up // down : (context + ready) * up // down]
                held = held[ready:]
        rest = -(-(len(held) - context) * up // down)
        piece = resample_poly(np.pad(held, (0, context)), up, down, window=taps)
        yield piece[context * up // down :][:rest]

    return stream()


def write_audio(path, audio):
    """audio (S,) or (1, S) -> a mono .wav, .flac or .ogg file that appears once it is complete."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the extension must be one of {', '.join(FORMATS)}")
    audio = np.clip(np.asarray(audio, dtype=np.float32).reshape(-1), -1, 1)
    seconds = range(0, len(audio), SAMPLE_RATE)  # one large write fails in Vorbis
    write_stream(path, (audio[start : start + SAMPLE_RATE] for start in seconds))


def write_stream(path, chunks):
    """The same from chunks (samples,), written as they come."""
    import soundfile

    kind = FORMATS[path.suffix.lower()]
    with (
        under_another_name(path) as part,
        soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, format=kind) as file,
    ):
        for chunk in chunks:
            file.write(np.asarray(chunk))


@contextmanager
def under_another_name(path):
    """A name beside `path` to write to. What stands there takes the place of `path` when all has
    gone well, and goes away when not; two processes that write the same file do not meet."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    with under_another_name(path) as part:
        part.write_text(text, encoding="utf-8")
