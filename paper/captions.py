"""Captions, and music without vocals: the parts of the data pipeline that use published models and
captions. A model is loaded when first used. If it is missing, the error says how to install it."""

import csv
import functools
import json
import math
import os
import re
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import soxr
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import nn

from audio import SAMPLE_RATE
from options import read_lines

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATE = 16000  # of LP-MusicCaps
HERE = Path(__file__).parent
VOCALS = re.compile(rf"\b({'|'.join(read_lines(HERE / 'voice_words.txt'))})\b", re.I)
# MTG-Jamendo's tags have no spaces.
SPACED = {words.replace(" ", ""): words for words in read_lines(HERE / "tag_words.txt")}


def mentions_vocals(caption):
    """Whether a caption has a word for a voice. "No vocals" counts too: a model should not meet the
    word only where there are none."""
    return VOCALS.search(caption) is not None


def facts_of(tags, vocals):
    """["genre---triphop", "mood/theme---sad", "mood/theme---dark"] -> {"genre": "trip hop", "mood":
    "sad and dark"}. Tags that mention a voice are left out unless `vocals`."""
    facts = {}
    for tag in tags:
        kind, _, word = tag.replace("mood/theme", "mood").partition("---")
        word = SPACED.get(word, word)
        if vocals or not mentions_vocals(word):
            facts[kind] = f"{facts[kind]} and {word}" if kind in facts else word
    return facts


@functools.lru_cache(1)
def read_table(file):
    """A table of captions -> {path or id of a track: caption}, with the first of several.

    file: a .csv, .tsv, .jsonl or .parquet file, or a dataset on the hub, with columns `path` and
    `caption`, or those of disco-eth/jamendo-fma-captions. That one has tracks of MTG-Jamendo and of
    the Free Music Archive, and an id that could be of either names none. ValueError, one sentence,
    if it cannot be read or lacks a column."""
    if not file:
        return {}
    with explained(f"{file} could not be read as a table with columns `path` and `caption`"):
        if not Path(file).exists() and re.fullmatch(r"[\w.-]+/[\w-]+", file):
            parquet = "data/train-00000-of-00001.parquet"
            file = hf_hub_download(file, parquet, repo_type="dataset")
        texts = {}
        for row in read_rows(file):
            if not ({"path", "id"} & {*row} and {"caption", "chatgpt_texts"} & {*row}):
                raise ValueError(f"its columns are {', '.join(map(str, row))}")
            key = row["path"] if "path" in row else row["id"]
            text = row["caption"] if "caption" in row else next(iter(row["chatgpt_texts"]), "")
            if text := str(text or "").strip():
                texts.setdefault(plain_name(str(key)), text)
    if any(re.fullmatch(r"0\d{5}", key) for key in texts):  # FMA's ids have six digits
        texts = {key: text for key, text in texts.items() if not re.fullmatch(r"1[0-5]\d{4}", key)}
    return texts


def plain_name(path):
    """A path or an id as tables name it: ./sub\\song.mp3 is sub/song.mp3, and é is one letter."""
    return unicodedata.normalize("NFC", os.path.normpath(path.replace("\\", "/")))


def read_rows(file):
    """A .csv, .tsv, .jsonl or .parquet file -> [{column: value}]"""
    suffix = Path(file).suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet  # `pip install pyarrow`

        return parquet.read_table(file).to_pylist()
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if suffix == ".jsonl":
            return [json.loads(line) for line in lines if line.strip()]
        return list(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","))


@contextmanager
def explained(advice):
    """Turns any error into a ValueError with advice: libraries raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{advice} ({reason})") from None


class LPMusicCaps(nn.Module):
    """Log-mel frames of ten seconds -> six convolutions that leave 32 positions -> BART (base) ->
    words. name: the hub's, or of a folder with transfer.pth and BART's config and tokenizer."""

    def __init__(self, name):
        super().__init__()
        from transformers import AutoConfig, AutoTokenizer, BartForConditionalGeneration

        folder = Path(name)
        bart = name if (folder / "config.json").is_file() else "facebook/bart-base"
        with explained(
            f"{name} holds no captioner: transfer.pth of huggingface.co/seungheondoh/lp-music-caps,"
            " config and tokenizer of facebook/bart-base"
        ):
            self.bart = BartForConditionalGeneration(AutoConfig.from_pretrained(bart))
            self.tokenizer = AutoTokenizer.from_pretrained(bart)
            D = self.bart.config.d_model
            halving = nn.ModuleList(nn.Conv1d(D, D, 3, stride=2, padding=1) for _ in range(5))
            first = nn.Conv1d(128, D, 3, padding=1)
            self.audio_encoder = nn.ModuleDict(dict(conv1=first, conv_stack=halving))
            self.audio_encoder.register_buffer("positional_embedding", torch.zeros(32, D))
            file = folder / "transfer.pth"
            file = file if folder.is_dir() else hf_hub_download(name, "transfer.pth")
            weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
            different = sum(self.load_state_dict(weights, strict=False), [])
            # The mel filters are computed here. Copies of BART's word embeddings have one name.
            ignored = re.compile("mel_encoder|embed_tokens|lm_head")
            if different := [name for name in different if not ignored.search(name)]:
                raise ValueError(f"it lacks or adds {different[:3]}")
        self.eval()

    @torch.inference_mode()
    def forward(self, audio):
        """audio (1, S) at 44.1 kHz -> a sentence for each ten seconds. The rest counts if it is
        longer than a second, or all there is; it is padded with silence."""
        audio = torch.from_numpy(soxr.resample(audio[0].numpy(), SAMPLE_RATE, RATE))
        n = max(1, math.ceil(len(audio) / RATE / 10 - 0.1))
        audio = F.pad(audio, (0, 10 * RATE * n - len(audio))).view(n, -1)
        h = log_mel(audio.to(self.bart.device))  # (n, 128, 1001)
        for convolution in (self.audio_encoder.conv1, *self.audio_encoder.conv_stack):
            h = F.gelu(convolution(h))
        h = h.mT + self.audio_encoder.positional_embedding  # (n, 32, D)
        ids = self.bart.generate(inputs_embeds=h, num_beams=5, min_length=2, max_length=128)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def log_mel(audio):
    """(n, S) at 16 kHz -> (n, 128, frames) in dB. Only the real part of the spectrum is squared, as
    in the code that trained LP-MusicCaps."""
    from transformers.audio_utils import mel_filter_bank

    filters = torch.from_numpy(mel_filter_bank(513, 128, 0, RATE / 2, RATE).T).to(audio)
    window = torch.hann_window(1024).to(audio)
    spectrum = torch.stft(audio, 1024, 160, window=window, return_complex=True)
    return 10 * (filters @ spectrum.real.square()).clamp(min=1e-10).log10()


class Describer:
    """A captioner, and a chat model of the hub (or a folder) that sums up its sentences, or "none".
    It answers greedily: the same music gets the same words."""

    def __init__(self, captioner, rephraser):
        from transformers import pipeline

        self.captioner, self.rephraser = captioner, rephraser
        if rephraser != "none":
            with explained(f"--rephraser {rephraser} could not be loaded, or does not chat"):
                self.chat = pipeline("text-generation", rephraser, dtype="auto", device=DEVICE)
                self.chat.tokenizer.get_chat_template()  # an error if there is none
        self.listen = LPMusicCaps(captioner).to(DEVICE)

    def __call__(self, audio):
        """audio (1, S) -> its caption, and the names of the models that made it"""
        heard = self.listen(audio)
        sentences = " ".join(dict.fromkeys(heard))  # those that are the same only once
        if self.rephraser == "none" or len(heard) == 1:
            return sentences, self.captioner
        lines = [*read_lines(HERE / "rephrase.txt"), *(f"- {sentence}" for sentence in heard)]
        question = [dict(role="user", content="\n".join(lines))]
        (answer,) = self.chat(question, max_new_tokens=160, do_sample=False, return_full_text=False)
        answer = re.sub(r"^[^\n]*:\s*\n", "", answer["generated_text"].strip())  # "Here it is:"
        answer = " ".join(answer.split()).strip("\"'“” ")
        return answer or sentences, f"{self.captioner}, {self.rephraser}"


class Separator:
    """HTDemucs: the sum of all stems but the vocals."""

    def __init__(self):
        with explained("removing vocals needs `pip install demucs` and the net, or --keep-vocals"):
            from demucs.api import Separator

            self.demucs = Separator("htdemucs", shifts=0)  # shifts would be random

    @torch.inference_mode()
    def __call__(self, audio):
        """audio (1, S) mono, 44.1 kHz -> (1, S) without vocals"""
        _, stems = self.demucs.separate_tensor(audio.expand(2, -1))
        kept = [stem for name, stem in stems.items() if name != "vocals"]  # each (2, S)
        return sum(kept).mean(0, keepdim=True).cpu()
