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

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from audio import HOP, SAMPLE_RATE, overlapped


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
        from toy.codec import ToyCodec

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
