"""Words for music, and music without words: the parts of the data pipeline that lean on others'
models. Each is loaded where it is used, and a missing one is answered by the line that installs it.

  captions from a table          your own, or published ones (disco-eth/jamendo-fma-captions)
  a sentence from the tags       MTG-Jamendo's genre, instrument and mood; needs nothing
  LPMusicCaps                    ten seconds of audio -> a caption (Doh et al., arXiv 2307.16372)
  Rephraser                      the three captions of a clip -> one, by any chat model
  Separator                      music -> music without vocals (HTDemucs, arXiv 2211.08553)
  mentions_vocals                does a caption speak of a voice that is no longer there?
"""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CAPTIONER = "seungheondoh/lp-music-caps"
REPHRASER = "meta-llama/Meta-Llama-3-8B-Instruct"

# ------------------------------------------------------------------------------------- words ----

VOCALS = re.compile(
    r"\b(vocal\w*|voices?|voiced|sing|sings|singing|singers?|sang|sung|songstress|lyric\w*|choirs?"
    r"|choral|chant\w*|rap|raps|rapping|rappers?|rapped|a ?cappella|acapella|humming|hums|hummed"
    r"|yodel\w*|scatting|croon\w*|falsetto|beatbox\w*|spoken|speak\w*|speech|talk\w*|narrat\w*"
    r"|whisper\w*|shout\w*|scream\w*|opera\w*|(soprano|tenor|baritone)(?! sax))\b",
    re.I,
)


def mentions_vocals(caption):
    """Whether a caption has a word for a voice. "No vocals" counts too: a model that reads of
    vocals only where there are none learns nothing good from them."""
    return VOCALS.search(caption) is not None


WRITTEN_TOGETHER = {  # MTG-Jamendo's tags have no spaces
    word.replace(" ", ""): word
    for word in """acoustic bass guitar, acoustic guitar, alternative rock, blues rock, bossa nova,
    classical guitar, classic rock, clean guitar, club dance, deep house, double bass, down tempo,
    drum machine, drum n bass, easy listening, electric guitar, electric piano, electro pop,
    ethnic rock, euro dance, hard rock, hard techno, heavy metal, hip hop, indie pop, indie rock,
    instrumental pop, instrumental rock, jazz funk, jazz fusion, latin jazz, minimal techno,
    new age, new wave, nu jazz, nu metal, pipe organ, pop folk, pop rock, post punk, post rock,
    progressive rock, psychedelic rock, punk rock, rock and roll, singer songwriter, slow motion,
    soft rock, sound scape, synth pop, synth rock, trip hop, world fusion""".split(",")
    for word in [" ".join(word.split())]
}


def sentence_from_tags(tags, vocals=False):
    """["genre---triphop", "instrument---piano", "mood/theme---dark"] -> "A dark trip hop track with
    piano." Tags that speak of a voice stay out unless `vocals`. Empty if there are none."""
    kinds = {"genre": [], "instrument": [], "mood/theme": []}
    for tag in tags:
        category, _, word = tag.partition("---")
        word = WRITTEN_TOGETHER.get(word, word)
        if category in kinds and word and (vocals or not mentions_vocals(word)):
            kinds[category].append(word)
    genres, instruments, moods = kinds.values()
    if not genres + instruments + moods:
        return ""
    sentence = " ".join(filter(None, [", ".join(moods), " and ".join(genres), "track"]))
    if instruments:
        *first, last = instruments
        sentence += " with " + (f"{', '.join(first)} and {last}" if first else last)
    article = "An" if sentence[0] in "aeiou" else "A"
    return f"{article} {sentence}."


# Columns by which tables call what we look for. A row may name a track by its path (from the music
# folder, or whole), by its file's name, with or without extension, or by its id.
PATHS = ("path", "file", "file_name", "filename", "audio", "location", "track_id", "id", "track")
CAPTIONS = ("caption", "text", "description", "captions")


def read_table(name):
    """A table of captions -> {track as the table calls it: caption}; the first of several captions
    counts. `name` is a .csv, .tsv, .jsonl or .parquet file, or a dataset's name on the hub.
    ValueError, one sentence, if it cannot be read or lacks a column."""
    path = Path(name)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.suffix:
        path = download(name, "data/train-00000-of-00001.parquet", "dataset")
    try:
        if path.suffix == ".parquet":
            rows = _parquet(path)
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                if path.suffix in (".jsonl", ".json"):
                    rows = [json.loads(line) for line in file if line.strip()]
                else:
                    between = "\t" if path.suffix == ".tsv" else ","
                    rows = list(csv.DictReader(file, delimiter=between))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{name} could not be read as a table of captions ({error})") from None
    columns = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    key, caption = (next((c for c in wanted if c in columns), None) for wanted in (PATHS, CAPTIONS))
    if not key or not caption:
        raise ValueError(
            f"{name} has the columns {columns}: a table of captions needs `path` and `caption`"
        )
    table = {}
    for row in rows:
        text = row.get(caption)
        text = text[0] if isinstance(text, list) and text else text
        if row.get(key) is not None and isinstance(text, str) and text.strip():
            table.setdefault(str(row[key]), text.strip())
    return table


def _parquet(path):
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: `pip install pyarrow`") from None
    return parquet.read_table(path).to_pylist()


def download(repository, file, kind="model"):
    """A file of the hub -> its path. ValueError that says where to get it by hand, if it fails."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type=kind))
    except Exception as error:  # the hub's client raises many kinds; all mean the same here
        place = f"huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
        raise ValueError(
            f"{file} of {place} could not be downloaded ({type(error).__name__}): fetch it by hand "
            "and give its path instead"
        ) from None


# ------------------------------------------------------------------------ audio -> a caption ----


class LPMusicCaps(nn.Module):
    """Pseudo captions: log-mel frames of ten seconds, six convolutions that leave 32 positions, and
    BART (base) from there to words. Parts are named as in the published weights.

    name: the hub's name, or a folder with transfer.pth and BART's config and tokenizer.
    """

    rate, seconds, mels = 16000, 10, 128

    def __init__(self, name=CAPTIONER):
        super().__init__()
        from transformers import AutoConfig, AutoTokenizer, BartForConditionalGeneration

        folder = Path(name)
        bart = str(folder) if (folder / "config.json").is_file() else "facebook/bart-base"
        try:
            config = AutoConfig.from_pretrained(bart)
            self.tokenizer = AutoTokenizer.from_pretrained(bart)
        except Exception as error:  # see `download`
            raise ValueError(
                f"{name} needs the config and tokenizer of {bart} ({type(error).__name__}): fetch "
                f"them from huggingface.co/{bart} into the folder of the weights"
            ) from None
        self.bart = BartForConditionalGeneration(config)
        width = config.d_model
        self.audio_encoder = nn.Module()
        self.audio_encoder.conv1 = nn.Conv1d(self.mels, width, 3, padding=1)
        halving = [nn.Conv1d(width, width, 3, stride=2, padding=1) for _ in range(5)]
        self.audio_encoder.conv_stack = nn.ModuleList(halving)
        self.audio_encoder.register_buffer("positional_embedding", torch.zeros(32, width))
        self._load(folder / "transfer.pth" if folder.is_dir() else download(name, "transfer.pth"))
        self.register_buffer("filters", mel_triangles(self.mels, 1024, self.rate), persistent=False)
        self.eval().requires_grad_(False)

    def _load(self, file):
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        except Exception as error:  # unpickling raises whatever it likes
            raise ValueError(
                f"{file} holds no captioner ({type(error).__name__}): expected transfer.pth of "
                f"huggingface.co/{CAPTIONER}"
            ) from None
        # The filters are computed here; and the copies of BART's word embeddings go by one name.
        weights = {k: v for k, v in weights.items() if ".mel_encoder." not in k}
        try:
            missing, unknown = self.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{file} is of another shape: {reason}") from None
        missing = [k for k in missing if "embed_tokens" not in k and "lm_head" not in k]
        if missing or unknown:
            raise ValueError(f"{file} is no captioner: it lacks or adds {(missing + unknown)[:3]}")

    @torch.inference_mode()
    def forward(self, audio):
        """audio (1, S) at 44.1 kHz -> captions of its ten-second windows. The last, filled up with
        silence, counts if it has more than a second of audio, or is the only one."""
        from scipy.signal import resample_poly
        from transformers.modeling_outputs import BaseModelOutput

        size = self.rate * self.seconds
        audio = torch.from_numpy(resample_poly(audio[0].numpy(), 160, 441)).float()
        windows = [w for i, w in enumerate(audio.split(size)) if i == 0 or len(w) > self.rate]
        windows = torch.stack([F.pad(w, (0, size - len(w))) for w in windows])  # (n, S)
        h = self.log_mel(windows.to(self.bart.device))  # (n, 128, 1001)
        encoder = self.audio_encoder
        for convolution in (encoder.conv1, *encoder.conv_stack):
            h = F.gelu(convolution(h))
        h = h.mT + encoder.positional_embedding  # (n, 32, D)
        heard = self.bart.model.encoder(inputs_embeds=h).last_hidden_state
        ids = self.bart.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=heard),
            num_beams=5, do_sample=False, min_length=2, max_length=128,
        )  # fmt: skip
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def log_mel(self, audio):
        """(n, S) -> (n, 128, frames) dB. Only the real part of the spectrum is squared: an
        oversight of the published front end, with which its weights were trained."""
        window = torch.hann_window(1024, device=audio.device)
        spectrum = torch.stft(audio, 1024, 160, window=window, return_complex=True)
        return 10 * (self.filters @ spectrum.real.square()).clamp(min=1e-10).log10()


def mel_triangles(mels, n_fft, rate):
    """-> (mels, n_fft / 2 + 1) triangles with peak 1 on the (HTK) mel scale, 0 to rate / 2 Hz."""
    top = math.log1p(rate / 2 / 700)
    edges = 700 * np.expm1(np.linspace(0, top, mels + 2))[:, None]
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    up = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.minimum(up, down)).clamp(min=0).float()


# --------------------------------------------------------------------- three captions -> one ----

PROMPT = """These sentences describe consecutive parts of one piece of music:

{captions}

Write one description of the whole piece, in one to three plain sentences. Keep every genre, mood, \
tempo and instrument that is named. Add nothing that is not said. Do not speak of the parts, of \
singers or of recording quality. Answer with the description alone."""


class Rephraser:
    """Any chat model of the hub (or a folder) that comes with a chat template. It answers greedily:
    the same captions give the same words."""

    def __init__(self, name=REPHRASER):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        except Exception as error:  # see `download`
            raise ValueError(
                f"the chat model {name} could not be loaded ({type(error).__name__}): accept its "
                f"licence at huggingface.co/{name} and run `hf auth login`, give a folder that "
                "holds it, name another with --rephraser, or join captions with --rephraser none"
            ) from None
        if not self.tokenizer.chat_template:
            raise ValueError(f"{name} has no chat template: --rephraser needs a chat model")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def __call__(self, captions):
        """Captions of the parts -> one of the whole; if it says nothing, all of them."""
        question = PROMPT.format(captions="\n".join(f"- {caption}" for caption in captions))
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        ).to(self.model.device)  # fmt: skip
        ids = self.model.generate(
            **inputs, do_sample=False, temperature=None, top_p=None, max_new_tokens=160,
            pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        answer = self.tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return tidy(answer) or join(captions)


def tidy(answer):
    """What a chat model says, without the courtesies around it."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # "Here is the description:"
        lines = lines[1:]
    return " ".join(lines).strip("\"'“” ")


def join(captions):
    """Sentences that say the same are said once."""
    return " ".join(dict.fromkeys(caption.strip() for caption in captions))


# ---------------------------------------------------------------------- music without vocals ----


class Separator:
    """HTDemucs: the sum of all stems but the vocals."""

    def __init__(self):
        try:
            from demucs.apply import apply_model
            from demucs.pretrained import get_model
        except (ImportError, OSError, RuntimeError) as error:  # the last two: a broken torchaudio
            raise ValueError(
                f"removing vocals needs demucs ({type(error).__name__}): `pip install demucs`, or "
                "leave them in with --keep-vocals"
            ) from None
        try:
            self.model = get_model("htdemucs").eval()
        except Exception as error:  # see `download`
            raise ValueError(
                "HTDemucs' weights could not be downloaded from dl.fbaipublicfiles.com "
                f"({type(error).__name__}): go online once, or leave vocals in with --keep-vocals"
            ) from None
        self.apply = apply_model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @torch.inference_mode()
    def __call__(self, audio):
        """audio (1, S) mono, 44.1 kHz -> (1, S) without vocals"""
        mean, scale = audio.mean(), audio.std() + 1e-8  # the level that it was trained at
        mix = ((audio - mean) / scale).expand(2, -1)[None]  # (1, 2, S)
        stems = self.apply(self.model, mix, shifts=0, split=True, overlap=0.25, device=self.device)
        stems = zip(self.model.sources, stems[0].cpu())  # of (2, S)
        kept = [stem for name, stem in stems if name != "vocals"]
        return sum(kept).mean(0, keepdim=True) * scale + mean
