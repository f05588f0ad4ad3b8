"""The networks behind the paper's metrics: OpenL3 for FD, PaSST for KL, CLAP for CLAP.

The settings follow stable-audio-metrics (arXiv 2402.04825), as the paper does; docs/evaluation.md
has a table of them. The weights (18 MB, 340 MB, 2.3 GB) are downloaded. n windows, W frames.
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


class PaperRuler:
    """The three networks, with the interface of toy.judge.Judge."""

    names = dict(fd="FD_openl3", kl="KL", clap="CLAP")

    def __init__(self, clap="", kl_average="clips"):
        self.kl_average = kl_average
        clap = clap or "music_audioset_epoch_15_esc_90.14.pt"
        with explained("`pip install -r requirements-paper.txt`, and be online for the weights"):
            import laion_clap
            import torchopenl3
            from hear21passt.base import get_basic_model

            self.openl3 = torchopenl3.core.load_audio_embedding_model("mel256", "music", 512)
            with contextlib.redirect_stdout(None):  # it prints all of its layers
                self.passt = get_basic_model(mode="logits", arch="passt_s_swa_p16_128_ap476").eval()
            self.clap = laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-base")
            self.clap.load_ckpt(hf_hub_download("lukewys/laion_clap", clap), verbose=False)
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

    def frames(self, audio):
        """-> (W, 512) of OpenL3, which puts half a second of silence in front, so that frame i is
        centred on second i / 2"""
        from torchopenl3 import get_audio_embedding

        audio = torch.from_numpy(soxr.resample(np.asarray(audio), SAMPLE_RATE, 48000))
        audio = audio * (10 ** (-1 / 20) / audio.abs().max().clamp(min=1e-8))  # peak at -1 dB
        options = dict(hop_size=0.5, center=True, verbose=False)
        return get_audio_embedding(audio, 48000, self.openl3, **options)[0][0].float()

    def logits(self, audio):
        """-> (n, 527) of PaSST: AudioSet's classes in each window"""
        return self.passt(ten_seconds(audio, 32000, 5)).float()

    def embedding(self, audio):
        """-> (512,) of CLAP. laion-clap would crop longer audio at random, so it gets windows."""
        audio = ten_seconds(audio, 48000, 10).numpy()
        return torch.from_numpy(self.clap.get_audio_embedding_from_data(audio)).mean(0)

    def read(self, captions):
        return torch.from_numpy(self.clap.get_text_embedding(captions))

    def tags(self, heard):
        """Of each clip (N, 527); with kl_average "segments", of each of its windows (N, n, 527)"""
        logits = torch.stack(heard.logits)  # (N, n, 527)
        return (logits if self.kl_average == "segments" else logits.mean(1)).softmax(-1)


def ten_seconds(audio, rate, every):
    """(S,) at 44.1 kHz -> windows (n, 10 s), one `every` so many seconds; short clips are padded"""
    audio = torch.from_numpy(soxr.resample(np.asarray(audio), SAMPLE_RATE, rate))
    return windows(F.pad(audio, (0, max(0, 10 * rate - len(audio)))), 10, every, rate)
