"""The networks whose opinion the paper prints: OpenL3 for FD, PaSST for KL, CLAP for CLAP.

Each is somebody else's, imported where it is used (`pip install -r requirements-paper.txt`), and
each figure depends on how audio is handed to it. What stands here is that: sample rate, loudness,
windows, pooling, after stable-audio-metrics (arXiv 2402.04825), whose settings the paper follows.

            heard at   windows                     output                    pooled
  OpenL3    48 kHz     1 s every 0.5 s, centred    512 (music, mel256)       not: all frames count
  PaSST     32 kHz     10 s every 5 s              527 logits (AudioSet)     mean, then softmax
  CLAP      48 kHz     10 s every 10 s             512, of audio and text    mean

The weights (OpenL3 18 MB, PaSST 340 MB, CLAP 2.3 GB) are fetched once, into torch's cache, where a
file that was fetched by hand is found as well.

S samples · n windows · W frames
"""

import contextlib
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from audio import SAMPLE_RATE
from toy.judge import windows

OPENL3 = "https://github.com/torchopenl3/torchopenl3-models/raw/master/torchopenl3_mel256_music_512.pth.tar"  # fmt: skip  # noqa: E501
PASST = "https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt"  # fmt: skip  # noqa: E501
CLAP = "https://huggingface.co/lukewys/laion_clap/resolve/main/"
CLAP_NAME = "music_audioset_epoch_15_esc_90.14.pt"


def weights(url) -> Path:
    """The file behind the address, fetched into torch's cache unless it is there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        try:
            torch.hub.download_url_to_file(url, str(partial), progress=True)
            os.replace(partial, path)
        except OSError as error:  # no network, no such file, disk full
            partial.unlink(missing_ok=True)
            raise ValueError(
                f"{path.name} is needed and could not be fetched ({error}): download {url} and put"
                f" it at {path}"
            ) from None
    return path


def resample(audio, rate):  # (S,) at 44.1 kHz -> (S',) float32
    from scipy.signal import resample_poly

    common = math.gcd(rate, SAMPLE_RATE)
    heard = resample_poly(np.asarray(audio, np.float64), rate // common, SAMPLE_RATE // common)
    return torch.from_numpy(heard.astype(np.float32))


def peak_normalised(audio, decibels=-1.0):
    """The loudest sample at -1 dB, as OpenL3's figures were made; silence stays silence."""
    return audio * (10 ** (decibels / 20) / audio.abs().max().clamp(min=1e-8))


def ten_seconds(audio, rate, every):  # (S,) -> (n, 10 s), a short clip filled up with silence
    return windows(F.pad(audio, (0, max(0, 10 * rate - len(audio)))), 10, every, rate)


class OpenL3:
    """audio -> frames (W, 512). torchopenl3 puts half a second of silence in front, so that frame
    i is centred on second i / 2."""

    def __init__(self):
        import torchopenl3

        weights(OPENL3)
        self.package = torchopenl3
        self.model = torchopenl3.core.load_audio_embedding_model("mel256", "music", 512)

    def __call__(self, audio):
        heard = peak_normalised(resample(audio, 48000))
        with torch.inference_mode():
            frames, _ = self.package.get_audio_embedding(
                heard, 48000, self.model, hop_size=0.5, center=True, verbose=False
            )
        return frames[0].float().cpu()


class PaSST:
    """audio -> logits (n, 527) of AudioSet's classes, a row for each window of ten seconds."""

    def __init__(self):
        from hear21passt.base import get_basic_model

        weights(PASST)
        with contextlib.redirect_stdout(None):  # it prints all of its layers
            self.model = get_basic_model(mode="logits", arch="passt_s_swa_p16_128_ap476").eval()

    def __call__(self, audio):
        with torch.inference_mode():
            return self.model(ten_seconds(resample(audio, 32000), 32000, 5)).float().cpu()


class Clap:
    """audio -> embedding (512,), captions -> embeddings (N, 512).

    Longer input than ten seconds is cut at random inside laion-clap, so it gets windows of ten,
    and their embeddings are averaged."""

    def __init__(self, name):
        import laion_clap

        try:
            self.model = laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-base")
        except OSError as error:
            raise ValueError(
                f"laion-clap needs roberta-base from https://huggingface.co/roberta-base ({error})"
            ) from None
        self.model.load_ckpt(str(weights(CLAP + name)), verbose=False)

    def __call__(self, audio):
        heard = ten_seconds(resample(audio, 48000), 48000, 10)
        with torch.inference_mode():
            return torch.from_numpy(self.model.get_audio_embedding_from_data(heard.numpy())).mean(0)

    def read(self, captions):
        with torch.inference_mode():
            return torch.from_numpy(self.model.get_text_embedding(captions))


class PaperRuler:
    """The three networks behind the toy judge's interface."""

    # stable-audio-metrics embeds mono twice, as left and right, which doubles the distance exactly;
    # the paper does not say whether it did.
    names = dict(fd="FD_openl3", fd_doubled="FD_openl3, mono twice", kl="KL", clap="CLAP")

    def __init__(self, clap=CLAP_NAME, kl_average="clips"):
        self.kl_average = kl_average
        try:
            self.openl3, self.passt, self.clap = OpenL3(), PaSST(), Clap(clap)
        except (ImportError, OSError, RuntimeError) as error:
            # A torchaudio that does not fit torch raises the other two.
            raise ValueError(
                f"the paper's metrics need `pip install -r requirements-paper.txt` ({error})"
            ) from None
        self.settings = (
            f"OpenL3 mel256 music 512, 1 s every 0.5 s, mono, peak at -1 dB; PaSST ap476, 10 s"
            f" every 5 s, KL over {kl_average}; CLAP {clap}, 10 s windows"
        )

    def listen(self, clips):
        """clips: an iterable of audio (S,) -> frames, window logits and embeddings of each."""
        heard = [(self.openl3(a), self.passt(a), self.clap(a)) for a in clips]
        frames, logits, embeddings = zip(*heard)
        return SimpleNamespace(frames=frames, logits=logits, embedding=torch.stack(embeddings))

    def read(self, captions):
        return self.clap.read(captions)

    def tags(self, heard):
        """One distribution a clip (N, 527), the windows' logits averaged, then softmax; or one a
        window (N, n, 527), whose divergences are averaged, as the paper says it does."""
        logits = torch.stack(heard.logits)  # (N, n, 527)
        return (logits if self.kl_average == "segments" else logits.mean(1)).softmax(-1)
