"""Captions, and music without vocals: the parts of the data pipeline that use published models and
captions. A model is loaded when first used. If it is missing, the error says how to install it.
"""

import csv
import functools
import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from options import read_lines

VOCALS = re.compile(
    r"\b(vocal\w*|voices?|voiced|sing|sings|singing|singers?|sang|sung|songstress|lyric\w*|choirs?"
    r"|choral|chant\w*|rap|raps|rapping|rappers?|rapped|a ?cappella|acapella|humming|hums|hummed"
    r"|yodel\w*|scatting|croon\w*|falsetto|beatbox\w*|spoken|speak\w*|speech|talk\w*|narrat\w*"
    r"|whisper\w*|shout\w*|scream\w*|opera\w*|(soprano|tenor|baritone)(?! sax))\b",
    re.I,
)


def mentions_vocals(caption):
    """Whether a caption has a word for a voice. "No vocals" counts too: a model should not meet the
    word only where there are none."""
    return VOCALS.search(caption) is not None


WORDS = read_lines(Path(__file__).with_name("tag_words.txt"))
SPACED = {words.replace(" ", ""): words for words in WORDS}  # MTG-Jamendo's tags have no spaces


def sentence_from_tags(tags, vocals=False):
    """["genre---triphop", "instrument---piano", "mood/theme---dark"] -> "A dark trip hop track with
    piano." Tags that mention a voice are left out unless `vocals`. Empty if there are none."""
    kinds = {"genre": [], "instrument": [], "mood/theme": []}
    for tag in tags:
        category, _, word = tag.partition("---")
        word = SPACED.get(word, word)
        if category in kinds and word and (vocals or not mentions_vocals(word)):
            kinds[category].append(word)
    genres, instruments, moods = kinds.values()
    if not genres + instruments + moods:
        return ""
    sentence = " ".join(filter(None, [", ".join(moods), " and ".join(genres), "track"]))
    if instruments:
        *first, last = instruments
        sentence += " with " + (f"{', '.join(first)} and {last}" if first else last)
    return f"{'An' if sentence[0] in 'aeiou' else 'A'} {sentence}."


# Columns of tables of captions. A row may name a track by its path (from the music folder, or
# whole), by its file's name, with or without extension, or by its id.
PATHS = ("path", "file", "file_name", "filename", "audio", "location", "track_id", "id", "track")
CAPTIONS = ("caption", "text", "description", "captions")


@functools.lru_cache(1)
def read_table(name):
    """A table of captions -> {track as the table calls it: caption}, with the first of several.

    name: a .csv, .tsv, .jsonl or .parquet file, or a dataset on the hub. ValueError, one sentence,
    if it cannot be read or lacks a column.
    """
    path = Path(name)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w-]+", name):
        path = download(name, "data/train-00000-of-00001.parquet", "dataset")
    with explained(f"{name} could not be read as a table of captions"):
        rows = _rows(path)
        columns = list(rows[0]) if rows else []
    key = next((column for column in PATHS if column in columns), None)
    caption = next((column for column in CAPTIONS if column in columns), None)
    if not key or not caption:
        raise ValueError(f"{name} has the columns {columns[:20]}: it needs `path` and `caption`")
    table = {}
    for row in rows:
        text = row.get(caption)
        text = next(iter(text), "") if isinstance(text, list) else text
        text = str(text or "").strip()
        if text and row.get(key) is not None:
            table.setdefault(str(row[key]), text)
    return table


def _rows(path):
    if path.suffix == ".parquet":
        from pyarrow import parquet  # `pip install pyarrow`

        return parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix in (".jsonl", ".json"):
            return [json.loads(line) for line in file if line.strip()]
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@contextmanager
def explained(advice):
    """Turns any error into a ValueError with advice: libraries raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{advice} ({reason})") from None


def download(repository, file, kind="model"):
    """A file of the hub -> its path. ValueError that says where to get it by hand, if it fails."""
    from huggingface_hub import hf_hub_download

    place = f"huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    with explained(f"{file} of {place} could not be downloaded: give the path of a copy instead"):
        return Path(hf_hub_download(repository, file, repo_type=kind))


class LPMusicCaps(nn.Module):
    """Log-mel frames of ten seconds -> six convolutions that leave 32 positions -> BART (base) ->
    words. Parts are named as in the published weights.

    name: the hub's name, or a folder with transfer.pth and BART's config and tokenizer.
    """

    rate, seconds, mels = 16000, 10, 128

    def __init__(self, name):
        super().__init__()
        from transformers import AutoConfig, AutoTokenizer, BartForConditionalGeneration
        from transformers.audio_utils import mel_filter_bank

        folder = Path(name)
        bart = name if (folder / "config.json").is_file() else "facebook/bart-base"
        with explained(f"{name} needs config and tokenizer of {bart}: add them to its folder"):
            config = AutoConfig.from_pretrained(bart)
            self.tokenizer = AutoTokenizer.from_pretrained(bart)
        self.bart = BartForConditionalGeneration(config)
        width = config.d_model
        halving = [nn.Conv1d(width, width, 3, stride=2, padding=1) for _ in range(5)]
        first = nn.Conv1d(self.mels, width, 3, padding=1)
        self.audio_encoder = nn.ModuleDict(dict(conv1=first, conv_stack=nn.ModuleList(halving)))
        self.audio_encoder.register_buffer("positional_embedding", torch.zeros(32, width))
        self._load(folder / "transfer.pth" if folder.is_dir() else download(name, "transfer.pth"))
        triangles = mel_filter_bank(513, self.mels, 0, self.rate / 2, self.rate, mel_scale="htk")
        filters = torch.from_numpy(triangles.T).float()  # (128, 513)
        self.register_buffer("filters", filters, persistent=False)
        self.eval()

    def _load(self, file):
        expected = "expected transfer.pth of huggingface.co/seungheondoh/lp-music-caps"
        with explained(f"{file} is no captioner: {expected}"):
            weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
            different = sum(self.load_state_dict(weights, strict=False), [])
            # The mel filters are computed here. Copies of BART's word embeddings have one name.
            ignored = re.compile("mel_encoder|embed_tokens|lm_head")
            if different := [name for name in different if not ignored.search(name)]:
                raise ValueError(f"it lacks or adds {different[:3]}")

    @torch.inference_mode()
    def forward(self, audio):
        """audio (1, S) at 44.1 kHz -> a sentence for each ten seconds. The rest counts if it is
        longer than a second, or all there is; it is padded with silence."""
        from scipy.signal import resample_poly
        from transformers.modeling_outputs import BaseModelOutput

        size = self.rate * self.seconds
        audio = torch.from_numpy(resample_poly(audio[0].numpy(), 160, 441)).float()
        windows = [w for i, w in enumerate(audio.split(size)) if i == 0 or len(w) > self.rate]
        windows = torch.stack([F.pad(w, (0, size - len(w))) for w in windows])  # (n, S)
        h = self.log_mel(windows.to(self.bart.device))  # (n, 128, 1001)
        for convolution in (self.audio_encoder.conv1, *self.audio_encoder.conv_stack):
            h = F.gelu(convolution(h))
        h = h.mT + self.audio_encoder.positional_embedding  # (n, 32, D)
        heard = self.bart.model.encoder(inputs_embeds=h).last_hidden_state
        ids = self.bart.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=heard),
            num_beams=5, do_sample=False, min_length=2, max_length=128,
        )  # fmt: skip
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def log_mel(self, audio):
        """(n, S) -> (n, 128, frames) in dB. Only the real part of the spectrum is squared, as in
        the code that trained the weights."""
        window = torch.hann_window(1024, device=audio.device)
        spectrum = torch.stft(audio, 1024, 160, window=window, return_complex=True)
        return 10 * (self.filters @ spectrum.real.square()).clamp(min=1e-10).log10()


PROMPT = """These sentences describe consecutive parts of one piece of music:

{captions}

Describe the whole piece in one to three plain sentences. Keep every genre, mood, tempo and \
instrument that is named, and add nothing. Do not speak of parts, singers or recording quality. \
Answer with the description alone."""


class Rephraser:
    """A chat model of the hub (or a folder) that has a chat template. It answers greedily: the same
    captions give the same words."""

    def __init__(self, name):
        from transformers import pipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with explained(
            f"the chat model {name} could not be loaded: accept its licence on huggingface.co, run"
            " `hf auth login`, give the path of a copy, or take --rephraser none"
        ):
            self.chat = pipeline("text-generation", model=name, dtype="auto", device=device)
        if not self.chat.tokenizer.chat_template:
            raise ValueError(f"{name} has no chat template: --rephraser needs a chat model")

    def __call__(self, captions):
        """Captions of the parts -> one of the whole; if the answer is empty, all of them."""
        question = PROMPT.format(captions="\n".join(f"- {caption}" for caption in captions))
        question = [{"role": "user", "content": question}]
        (answer,) = self.chat(question, max_new_tokens=160, do_sample=False, return_full_text=False)
        return tidy(answer["generated_text"]) or join(captions)


def tidy(answer):
    """A chat model's answer without quotation marks and an opening such as "Here it is:"."""
    answer = re.sub(r"^[^\n]*:\s*\n", "", answer.strip())
    return " ".join(answer.split()).strip("\"'“” ")


def join(captions):
    """All captions, those that are the same only once."""
    return " ".join(dict.fromkeys(caption.strip() for caption in captions))


class Describer:
    """audio (1, S) -> its caption, and the names of the models that made it."""

    def __init__(self, captioner, rephraser="none"):
        self.captioner = captioner
        self.rephraser = rephraser
        self.listen = LPMusicCaps(captioner).to("cuda" if torch.cuda.is_available() else "cpu")
        self.rephrase = None if rephraser == "none" else Rephraser(rephraser)

    def __call__(self, audio):
        heard = self.listen(audio)
        if self.rephrase and len(heard) > 1:
            return self.rephrase(heard), f"{self.captioner}, {self.rephraser}"
        return join(heard), self.captioner


class Separator:
    """HTDemucs: the sum of all stems but the vocals."""

    def __init__(self):
        with explained("removing vocals needs `pip install demucs`, or take --keep-vocals"):
            from demucs.apply import apply_model
            from demucs.pretrained import get_model
        with explained("HTDemucs' weights could not be downloaded: go online, or --keep-vocals"):
            self.model = get_model("htdemucs").eval()
        self.apply = apply_model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @torch.inference_mode()
    def __call__(self, audio):
        """audio (1, S) mono, 44.1 kHz -> (1, S) without vocals"""
        mean, scale = audio.mean(), audio.std() + 1e-8  # the level that it was trained at
        mix = ((audio - mean) / scale).expand(2, -1)[None]  # (1, 2, S)
        stems = self.apply(self.model, mix, shifts=0, split=True, overlap=0.25, device=self.device)
        kept = [i for i, name in enumerate(self.model.sources) if name != "vocals"]
        return stems[0, kept].sum(0).mean(0, keepdim=True).cpu() * scale + mean
