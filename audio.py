"""Audio: spectrograms, overlapping windows, and files.

B batch · S samples · T frames, T = ceil(S / 512) · D bands · F = 1025 bins
"""

import os
import tempfile
from contextlib import contextmanager, suppress
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


def split_frames(audio):
    """(B, S) -> (B, T, 2048), a view"""
    padding = -audio.shape[-1] % HOP
    return F.pad(audio, (EDGE, EDGE + padding)).unfold(-1, N_FFT, HOP)


def stft(frames):
    """(B, T, 2048) -> (B, T, F) complex"""
    return torch.fft.rfft(frames * HANN.to(frames.device))


def power(spectrum):
    """|spectrum|^2, without the square root of abs()"""
    return spectrum.real.square() + spectrum.imag.square()


def istft(spectrum):
    """(B, T, F) complex -> (B, EDGE + 512 T + EDGE), by least squares"""
    T = spectrum.shape[1]
    hann = HANN.to(spectrum.device)
    pieces = (torch.fft.irfft(spectrum, n=N_FFT) * hann).unflatten(-1, (4, HOP))  # (B, T, 4, 512)
    weights = hann.square().view(4, HOP)
    total = pieces.new_zeros(len(pieces), T + 3, HOP)
    weight = pieces.new_zeros(T + 3, HOP)
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
    """(B, S) -> (B, T, D) mean power of each band, a sine of amplitude 1 being about 1."""
    filters = filters / filters.sum(1, keepdim=True) / FULL_SCALE
    blocks = split_frames(audio).split(128, dim=1)  # they stay in the cache and need little memory
    return torch.cat([power(stft(frames)) @ filters.T for frames in blocks], 1)


def mel_spectrogram(audio):
    """audio (B, S) -> (B, 128, T) in dB: mean power in each of 128 triangles on the mel scale from
    0 to 22050 Hz, Hann window of 2048, hop 512; 0 dB: a full-scale sine, -100: silence."""
    power = band_power(audio, filterbank(128, 700.0, 0.0, SAMPLE_RATE / 2).to(audio.device))
    return 10 * power.clamp(min=1e-10).log10().mT


# ----------------------------------------------------------------------- audio of any length ----


def join(before, audio, overlap):
    """Cross-fades from `before` (B, 512 overlap) to `audio` over four frames in the middle of the
    overlap: earlier the new audio lacks its past, later the old one lacks its future."""
    if before is None:
        return audio
    length = min(overlap * HOP, audio.shape[-1])
    ramp = torch.arange(length, device=audio.device)
    weight = ((overlap / 2 + 2) * HOP - ramp).div(4 * HOP).clamp(0, 1)
    head = torch.lerp(audio[:, :length], before[:, :length], weight)
    return torch.cat([head, audio[:, length:]], -1)


@torch.no_grad()
def overlapped(codec, pieces, to_z, step=STEP):
    """Decodes pieces (B, ..., t) of codes or z, cut anywhere -> yields audio (B, samples), a window
    at a time. A window starts on the last frames of the one before and continues its audio. The
    windows depend on the total length only, so the cuts do not change the audio."""
    held = None
    before = None
    window = step + codec.overlap
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], -1)
        while held.shape[-1] > window:
            audio = codec.decode_window(to_z(held[..., :window]), before)
            audio = join(before, audio, codec.overlap)
            yield audio[:, : step * HOP]
            held = held[..., step:]
            before = audio[:, step * HOP :]
    if held is not None and held.shape[-1]:
        yield join(before, codec.decode_window(to_z(held), before), codec.overlap)


# ------------------------------------------------------------------------------- audio files ----


def read_audio(path):
    """Any file that FFmpeg reads -> (1, S) float32, mono, 44.1 kHz.

    ValueError, one sentence that begins with the path, if it is not audio or holds no samples.
    """
    return torch.from_numpy(np.concatenate(list(audio_blocks(path))))[None]


def audio_blocks(path):
    """Yields the same audio in pieces (s,) of a few seconds, so that a file of hours needs no more
    memory than one of seconds. A file counts for what can be read of it, not for the length that
    its header announces."""
    samples = 0
    for block in _decoded(path):
        if not np.isfinite(block).all():
            raise ValueError(f"{path} holds samples that are not numbers")
        samples += len(block)
        yield block
    if not samples:
        raise ValueError(f"{path} holds no samples")


def _decoded(path):
    import av  # FFmpeg's libraries
    import soxr

    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            if not container.streams.audio:
                raise ValueError(f"{path} holds no audio")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise ValueError(f"{path} holds audio that cannot be decoded")
            if not 1000 <= stream.rate <= 1_000_000:
                raise ValueError(f"{path} claims a sample rate of {stream.rate} Hz")
            to_float = av.AudioResampler(format="fltp")
            to_rate = soxr.ResampleStream(stream.rate, SAMPLE_RATE, 1, dtype="float32")
            mono = []
            for packet in container.demux(stream):
                with suppress(av.FFmpegError):  # what is damaged or cut off is left out
                    for frame in packet.decode():
                        mono += [f.to_ndarray().mean(0) for f in to_float.resample(frame)]  # (s,)
                if sum(map(len, mono)) > 1 << 18:
                    yield to_rate.resample_chunk(np.concatenate(mono))
                    mono = []
            yield to_rate.resample_chunk(np.concatenate([*mono, np.empty(0, "f4")]), last=True)
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not readable audio: {error.strerror}") from None


def write_audio(path, audio):
    """audio (S,) or (1, S) -> a mono .wav, .flac or .ogg file, which appears when complete."""
    audio = np.ravel(audio)
    seconds = np.split(audio, range(SAMPLE_RATE, len(audio), SAMPLE_RATE))
    write_stream(path, seconds, len(audio))  # one large write fails in Vorbis


def write_stream(path, chunks, samples=0):
    """The same from chunks (samples,) as they come. samples: how many are expected; a .wav beyond
    4 GiB is written as RF64. OSError if the file cannot be written."""
    import soundfile

    path = Path(path)
    form = FORMATS.get(path.suffix.lower())
    if not form:
        raise ValueError(f"{path}: the extension must be one of {', '.join(FORMATS)}")
    if form == "WAV" and 2 * samples > 4_000_000_000:
        form = "RF64"
    try:
        with replacing(path) as part:
            with soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, format=form) as file:
                for chunk in chunks:
                    file.write(np.asarray(chunk))
    except soundfile.LibsndfileError as error:
        raise OSError(f"{path} could not be written; is the disk full? ({error})") from None


def ensure_writable(folder):
    """Makes a folder; OSError, before any work is done, if files cannot be written there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def lock_folder(folder):
    """Makes a folder and locks it for this process, until the returned file is closed. ValueError
    if another process holds the lock: two that write to one folder would lose work."""
    ensure_writable(folder)
    file = open(Path(folder) / ".lock", "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows
    except OSError:
        raise ValueError(f"another process is writing to {folder}: let it finish") from None
    return file


@contextmanager
def replacing(path):
    """A temporary file name next to `path`. What is written there replaces `path` at the end if all
    went well, and is removed if not; two processes that write the same file do not interfere."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    """Writes UTF-8 text to a file that appears when complete."""
    with replacing(Path(path)) as part:
        part.write_text(text, encoding="utf-8")
