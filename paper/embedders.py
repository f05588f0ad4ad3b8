"""The networks behind the paper's metrics: OpenL3 for FD, PaSST for KL, CLAP for CLAP.

They are imported where they are used (`pip install -r requirements-paper.txt`). Each figure depends
on how the network gets its audio; the settings follow stable-audio-metrics (arXiv 2402.04825), as
the paper does.

            sample rate   windows                     output                   over the windows
  OpenL3    48 kHz        1 s every 0.5 s, centred    512 (music, mel256)      all are frames of FD
  PaSST     32 kHz        10 s every 5 s              527 logits (AudioSet)    mean, then softmax
  CLAP      48 kHz        10 s every 10 s             512, of audio and text   mean

OpenL3 gets mono. stable-audio-metrics embeds mono twice, as left and right, which doubles the FD
exactly; the paper does not say what it did. The weights (18 MB, 340 MB, 2.3 GB) are downloaded to
the caches of torch and of the hub. S samples, n windows, W frames.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download

from audio import SAMPLE_RATE
from paper.captions import explained
from toy.judge import windows

CLAP = "music_audioset_epoch_15_esc_90.14.pt"  # of huggingface.co/lukewys/laion_clap


class PaperRuler:
    """The three networks, with the interface of toy.judge.Judge."""

    names = dict(fd="FD_openl3", kl="KL", clap="CLAP")

    def __init__(self, clap="", kl_average="clips"):
        self.kl_average = kl_average
        clap = clap or CLAP
        with explained(
            "the paper's metrics need `pip install -r requirements-paper.txt`, and once the net,"
            " for their weights and huggingface.co/roberta-base"
        ):
            self.frames, self.logits = openl3(), passt()
            self.embedding, self.read = load_clap(clap)
        self.settings = (
            "OpenL3 mel256 music 512, 1 s every 0.5 s, peak at -1 dB, mono (mono embedded as left"
            f" and right doubles FD); PaSST ap476, 10 s every 5 s, KL over {kl_average}; CLAP"
            f" {clap}, 10 s windows"
        )

    @torch.inference_mode()
    def listen(self, clips):
        """clips: an iterable of audio (S,) -> frames, window logits and embeddings of each"""
        heard = [(self.frames(a), self.logits(a), self.embedding(a)) for a in clips]
        frames, logits, embeddings = zip(*heard)
        return SimpleNamespace(frames=frames, logits=logits, embedding=torch.stack(embeddings))

    def tags(self, heard):
        """One distribution for each clip (N, 527), from the mean of its windows' logits; or with
        kl_average "segments" one for each window (N, n, 527)."""
        logits = torch.stack(heard.logits)  # (N, n, 527)
        return (logits if self.kl_average == "segments" else logits.mean(1)).softmax(-1)


def openl3():
    """-> a function: audio -> frames (W, 512). torchopenl3 puts half a second of silence in front,
    so frame i is centred on second i / 2."""
    import torchopenl3

    model = torchopenl3.core.load_audio_embedding_model("mel256", "music", 512)
    options = dict(hop_size=0.5, center=True, verbose=False)

    def embed(audio):
        audio = peak_normalised(resample(audio, 48000))
        return torchopenl3.get_audio_embedding(audio, 48000, model, **options)[0][0].float()

    return embed


def passt():
    """-> a function: audio -> logits (n, 527) of AudioSet's classes, for each window"""
    from hear21passt.base import get_basic_model

    with contextlib.redirect_stdout(None):  # it prints all of its layers
        model = get_basic_model(mode="logits", arch="passt_s_swa_p16_128_ap476").eval()
    return lambda audio: model(ten_seconds(resample(audio, 32000), 32000, 5)).float()


def load_clap(name):
    """-> two functions: audio -> embedding (512,), and captions -> embeddings (N, 512). laion-clap
    would crop longer audio at random, so it gets windows."""
    import laion_clap

    model = laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-base")
    model.load_ckpt(hf_hub_download("lukewys/laion_clap", name), verbose=False)

    def embed(audio):
        audio = ten_seconds(resample(audio, 48000), 48000, 10)
        return torch.from_numpy(model.get_audio_embedding_from_data(audio.numpy())).mean(0)

    return embed, lambda captions: torch.from_numpy(model.get_text_embedding(captions))


def resample(audio, rate):
    """(S,) at 44.1 kHz -> (S',) float32"""
    return torch.from_numpy(soxr.resample(np.asarray(audio, np.float32), SAMPLE_RATE, rate))


def peak_normalised(audio):
    """Scales the largest sample to -1 dB, as OpenL3's figures are made. Silence stays silence."""
    return audio * (10 ** (-1 / 20) / audio.abs().max().clamp(min=1e-8))


def ten_seconds(audio, rate, every):
    """(S,) -> windows (n, 10 s); a short clip is padded with silence"""
    return windows(F.pad(audio, (0, max(0, 10 * rate - len(audio)))), 10, every, rate)
