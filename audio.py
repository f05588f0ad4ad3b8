"""Audio: spectrograms, overlapping windows, and files.

B batch · S samples · T frames, T = ceil(S / 512) · D bands · F = 1025 bins
"""

import math
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

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
