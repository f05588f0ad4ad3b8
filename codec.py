"""The codec: between audio and the table of integers that the language models predict.

Ten seconds of audio become codes (9, 862): nine residual codebooks, 86.13 frames per second. The
first codebook is a sketch of each frame's spectrum (loudness, timbre, rhythm); each further one
encodes what the codebooks before it have missed. There are two codecs with one interface:

  toy   ships: signal processing and k-means, fitted in a minute (toy/codec.py)
  dac   the paper's: Descript's neural codec (arXiv 2306.06546), weights downloaded on first use

  encode(audio (B,S)) -> codes (B,9,T)                  T = ceil(S / 512)
  from_codes(codes (B,k,T)) -> z (B,D,T)                of the k leading codebooks
  decode(z) -> audio (B,512 T)
  vectors(codes (B,k,T)) -> (B,k,8,T)                   the codebook entries, for the refiner
  snap(vectors (B,k,8,T), first) -> codes (B,k,T)       the nearest entries of codebooks first ...

`decode_stream` decodes any length in constant memory, window by window.
"""

import torch
import torch.nn.functional as F
from torch import nn

from audio import HOP, SAMPLE_RATE, STEP, overlapped


def decode_stream(codec, code_chunks, step=STEP):
    """An iterable of codes (k, t), of any sizes -> yields audio (samples,), `step` frames at a
    time, or 1.5 s. The same codes give the same bytes, however they are cut into chunks."""
    pieces = (chunk[None] for chunk in code_chunks)
    for audio in overlapped(codec, pieces, codec.from_codes, step):
        yield audio[0]


class DACCodec(nn.Module):
    """The paper's codec. `model` is dac.DAC or transformers' DacModel, whose parts have the same
    names. Codes equal theirs; `decode` of long audio goes window by window."""

    name, sample_rate, hop = "dac", SAMPLE_RATE, HOP
    overlap = 32  # frames: the decoder's receptive field is some ten frames to either side

    def __init__(self, model):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.quantizers = model.quantizer.quantizers
        self.codebooks = len(self.quantizers)
        self.codebook_size, self.code_dim = self.quantizers[0].codebook.weight.shape

    def encode(self, audio):  # (B, S) -> (B, 9, T)
        audio = F.pad(audio, (0, -audio.shape[-1] % HOP))
        residual = self.model.encoder(audio[:, None])  # (B, hidden, T)
        codes = []
        for quantizer in self.quantizers:
            found, _, _, code, _ = quantizer(residual)
            residual = residual - found
            codes.append(code)
        return torch.stack(codes, 1)

    def from_codes(self, codes):  # (B, k, T) -> (B, hidden, T)
        return self.model.quantizer.from_codes(codes)[0]

    def vectors(self, codes):  # (B, k, T) -> (B, k, 8, T)
        pairs = zip(self.quantizers, codes.unbind(1))
        return torch.stack([quantizer.codebook(code).mT for quantizer, code in pairs], 1)

    def snap(self, vectors, first=0):  # (B, k, 8, T) -> (B, k, T), as the toy codec does it
        linear = lambda layer, v: layer(v) - layer.bias[:, None]  # differences have no bias
        lost = 0  # (B, hidden, T), what the levels so far have rounded away
        codes = []
        for vector, quantizer in zip(vectors.unbind(1), self.quantizers[first:]):
            wanted = vector + linear(quantizer.in_proj, lost) if codes else vector
            entry, code = quantizer.decode_latents(wanted)  # the nearest in direction
            lost = lost + linear(quantizer.out_proj, vector - entry)
            codes.append(code)
        return torch.stack(codes, 1)

    def decode(self, z):  # (B, hidden, T) -> (B, 512 T)
        return torch.cat(list(overlapped(self, [z], lambda z: z)), -1)

    def decode_window(self, z, before=None):  # needs no `before`: the overlap holds the context
        return self.model.decoder(z)[:, 0]


def load_codec(name="toy"):
    """The codec "toy", which ships, or "dac", whose weights are downloaded once. ValueError, one
    sentence, if it cannot be had."""
    if name == "toy":
        from toy import codec

        return codec.load()
    if name != "dac":
        raise ValueError(f"unknown codec {name!r}: choose toy or dac")
    try:
        import dac  # descript-audio-codec; with a broken torchaudio this is not an ImportError

        return DACCodec(dac.DAC.load(str(dac.utils.download("44khz"))))
    except (ImportError, OSError, RuntimeError):
        from transformers import DacModel  # the same weights
    try:
        return DACCodec(DacModel.from_pretrained("descript/dac_44khz"))
    except OSError:
        raise ValueError(
            "DAC's weights could not be downloaded: where there is a network, run `hf download "
            "descript/dac_44khz`, and bring ~/.cache/huggingface here"
        ) from None
