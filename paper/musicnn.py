"""musicnn (Pons & Serra, arXiv 1909.06654): an ear that was trained on real music, without a hub.

`pip install --no-deps musicnn` brings the weights of two taggers inside its wheel (ISC licence).
Its own code wants TensorFlow 1, so the checkpoint is read here, and the network is in PyTorch. MTT
was trained on MagnaTagATune (test ROC-AUC 0.907), MSD on the Million Song Dataset (0.880).

n patches of 3 seconds · T frames of 16 ms · C channels
"""

import importlib.util
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F

from audio import SAMPLE_RATE

RATE, FFT, HOP, MELS, PATCH = 16000, 512, 256, 96, 187

# The outputs of both networks, in their order.
TAGS = dict(
    MTT="guitar|classical|slow|techno|strings|drums|electronic|rock|fast|piano|ambient|beat|violin"
    "|vocal|synth|female|indian|opera|male|singing|vocals|no vocals|harpsichord|loud|quiet|flute"
    "|woman|male vocal|no vocal|pop|soft|sitar|solo|man|classic|choir|voice|new age|dance"
    "|male voice|female vocal|beats|harp|cello|no voice|weird|country|metal|female voice|choral",
    MSD="rock|pop|alternative|indie|electronic|female vocalists|dance|00s|alternative rock|jazz"
    "|beautiful|metal|chillout|male vocalists|classic rock|soul|indie rock|mellow|electronica|80s"
    "|folk|90s|chill|instrumental|punk|oldies|blues|hard rock|ambient|acoustic|experimental"
    "|female vocalist|guitar|hip-hop|70s|party|country|easy listening|sexy|catchy|funk|electro"
    "|heavy metal|progressive rock|60s|rnb|indie pop|sad|house|happy",
)
TAGS = {name: tags.split("|") for name, tags in TAGS.items()}

# ---------------------------------------------------------------------------- the checkpoint ----
#
# TensorFlow's .index file is a LevelDB table, here with one block of tensors. Each key leaves out
# what it shares with the key before. The values are protobuf messages: field 2 is the tensor's
# shape, 4 and 5 its place and size in the .data file.


def varint(data, at):
    """An integer of 7 bits a byte, lowest first -> its value, and where the next thing begins"""
    if data[at] < 128:
        return data[at], at + 1
    rest, end = varint(data, at + 1)
    return data[at] & 127 | rest << 7, end


def block(data):
    """Yields the (key, value) pairs of a block."""
    end = len(data) - 4 - 4 * int.from_bytes(data[-4:], "little")  # what follows is for searching
    at, key = 0, b""
    while at < end:
        shared, at = varint(data, at)
        more, at = varint(data, at)
        size, at = varint(data, at)
        key = key[:shared] + data[at : at + more]
        yield key.decode(), data[at + more : at + more + size]
        at += more + size


def message(data):
    """A protobuf message -> {field number: [values]}"""
    found, at = defaultdict(list), 0
    while at < len(data):
        tag, at = varint(data, at)
        value, at = (4, at) if tag & 7 == 5 else varint(data, at)  # a number, or a size in bytes
        if tag & 7:
            value, at = data[at : at + value], at + value
        found[tag >> 3].append(value)
    return found


def read_checkpoint(folder):
    """TensorFlow's checkpoint -> {name: tensor}, without the optimizer's."""
    index, data = ((folder / name).read_bytes() for name in (".index", ".data-00000-of-00001"))
    end, _ = varint(index[-48:], 0)  # of the block, and of 5 bytes after it
    tensors = {}
    for name, value in block(index[: end - 5]):
        if name and "Adam" not in name and not name.startswith("beta"):
            entry = message(value)
            shape = [message(size)[1][0] for size in message(entry[2][0])[2]]
            values = np.frombuffer(data, np.float32, entry[5][0] // 4, entry.get(4, [0])[0])
            tensors[name] = torch.from_numpy(values.reshape(shape).copy())
    return tensors


# -------------------------------------------------------------------------------- the network ----


class Tagger:
    """Log-mel patches -> wide convolutions over pitch (timbre) and over time (rhythm) -> three
    residual convolutions -> the maximum and the mean over time -> 200 numbers -> 50 tags."""

    def __init__(self, name):
        wheel = importlib.util.find_spec("musicnn")
        if wheel is None:
            raise ValueError("musicnn is missing: `pip install --no-deps musicnn`")
        self.weights = read_checkpoint(Path(wheel.submodule_search_locations[0], f"{name}_musicnn"))

    def layer(self, kind, i, part):
        return self.weights[f"{kind}_{i}/{part}" if i else f"{kind}/{part}"]

    def norm(self, x, i):
        """Batch normalisation i of x (n, C, ...)"""
        parts = "moving_mean moving_variance gamma beta".split()
        return F.batch_norm(x, *(self.layer("batch_normalization", i, p) for p in parts), eps=1e-3)

    def convolution(self, x, i):
        """Convolution i with ReLU and normalisation; keeps the length in time."""
        kernel = self.layer("conv2d", i, "kernel").permute(3, 2, 0, 1)  # (out, in, time, pitch)
        time = kernel.shape[2] - 1
        x = F.pad(x, (0, 0, time // 2, time - time // 2))
        return self.norm(F.conv2d(x, kernel, self.layer("conv2d", i, "bias")).relu(), i + 1)

    def dense(self, x, name):
        return x @ self.weights[f"{name}/kernel"] + self.weights[f"{name}/bias"]

    def __call__(self, mel):
        """mel (n, T, 96) -> embeddings (n, 200), tags (n, 50) in [0, 1]"""
        x = self.norm(mel[:, None], 0)  # (n, 1, T, 96)
        front = torch.cat([self.convolution(x, i).amax(3) for i in range(5)], 1)  # (n, 561, T)
        # From here on the channels take the place of the pitches.
        levels = [front, self.convolution(front.mT[:, None], 5)[..., 0]]  # (n, 561 and 64, T)
        for i in (6, 7):
            levels.append(levels[-1] + self.convolution(levels[-1].mT[:, None], i)[..., 0])
        h = torch.cat(levels, 1)  # (n, 753, T)
        pooled = torch.stack([h.amax(2), h.mean(2)], 2).flatten(1)  # alternating
        embedding = self.norm(self.dense(self.norm(pooled, 9), "dense").relu(), 10)
        return embedding, self.dense(embedding, "dense_1").sigmoid()


def patches(audio):
    """audio (S,) at 44.1 kHz -> log-mel patches (n, 187, 96); less than a patch is repeated"""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(FFT // 2 + 1, MELS, 0, RATE / 2, RATE, "slaney", "slaney")
    filters = torch.from_numpy(bank).float()  # (257, 96)
    audio = torch.from_numpy(soxr.resample(np.asarray(audio, np.float32), SAMPLE_RATE, RATE))
    spectrum = torch.stft(audio, FFT, HOP, window=torch.hann_window(FFT), return_complex=True)
    mel = torch.log10(1 + 10000 * spectrum.abs().square().T @ filters)  # (T, 96)
    mel = mel.repeat(math.ceil(PATCH / len(mel)), 1)
    return mel[: len(mel) // PATCH * PATCH].view(-1, PATCH, MELS)


# ------------------------------------------------------------------------------------ the ear ----

KINDS = {  # kind of fact: least score, most tags, tags
    "mood": (0.12, 1, "beautiful|chillout|mellow|sad|happy|sexy|catchy|soft|weird|quiet|loud"),
    "pace": (0.15, 1, "slow|fast"),
    "genre": (0.2, 2, "rock|pop|alternative|indie|electronic|dance|alternative rock|jazz|metal|soul"
        "|classic rock|indie rock|folk|punk|blues|hard rock|ambient|experimental|hip-hop|country"
        "|easy listening|funk|electro|heavy metal|progressive rock|rnb|indie pop|house|classical"
        "|techno|indian|opera|new age"),
    "instrument": (0.15, 2, "guitar|strings|drums|piano|violin|synth|harpsichord|flute|sitar|harp"
        "|cello|choir"),
}  # fmt: skip


class Musicnn:
    """Both taggers. ValueError if musicnn is not installed."""

    def __init__(self):
        self.taggers = {name: Tagger(name) for name in TAGS}

    @torch.inference_mode()
    def listen(self, audio):
        """audio (S,) at 44.1 kHz -> embeddings (n, 200) by MTT, and {tag: score in [0, 1]}, the
        mean over patches, of a tag that both networks know the greater one"""
        mel, scores = patches(audio), Counter()
        heard = {name: tagger(mel) for name, tagger in self.taggers.items()}
        for name, (_, tags) in heard.items():
            scores |= dict(zip(TAGS[name], tags.mean(0).tolist()))
        return heard["MTT"][0], scores

    def facts(self, audio):
        """audio (S,) at 44.1 kHz -> {"genre": "ambient electronic", "instrument": "strings and
        flute", "pace": "slow", "bpm": "84"}: what is heard plainly enough, maybe nothing"""
        scores, facts = self.listen(audio)[1], {}
        for kind, (least, most, tags) in KINDS.items():
            heard = sorted(tags.split("|"), key=scores.get, reverse=True)[:most]
            if heard := [tag for tag in heard if scores[tag] >= least]:
                facts[kind] = (" and " if kind == "instrument" else " ").join(heard)
        if bpm := tempo(audio):
            facts["bpm"] = str(bpm)
        return facts


def tempo(audio):
    """audio (S,) at 44.1 kHz -> beats per minute, or None if no beat is plain: how well the onsets
    match themselves a beat later, in favour of 120 bpm (Ellis, J. New Music Research 36, 2007)."""
    onsets = patches(audio).flatten(0, 1).diff(dim=0).clamp(min=0).mean(1)
    onsets = onsets - onsets.mean()
    power = torch.fft.rfft(onsets, 2 * len(onsets)).abs().square()
    match = torch.fft.irfft(power)[: len(onsets)] / torch.arange(len(onsets), 0, -1)
    match = match / match[0].clamp(min=1e-12)
    beats = np.arange(50, 201)
    frames = 60 * RATE / HOP / beats  # from beat to beat
    at = np.interp(frames, np.arange(len(match)), match)
    best = (at * np.exp(-0.5 * np.log2(beats / 120) ** 2)).argmax()
    return int(beats[best]) if at[best] > 0.15 else None
