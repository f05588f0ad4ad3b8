"""An outside ear for evaluate.py: musicnn, which never heard the toy world or your music.

    python evaluate.py --ear musicnn                          the toy world, beside its own judge
    python evaluate.py out/mine/best --data data/mine         held-out clips of a data folder

FD_musicnn is the Fréchet distance of its 200 numbers for every 3 seconds. AUC says whether words
act: how often a clip whose prompt names a tag has more of it than a clip whose prompt does not. 0.5
is chance. Its absolute scores are low on music unlike its training set, so look at ratios.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import evaluate
from audio import SAMPLE_RATE, audio_blocks
from data import Clips
from paper.musicnn import TAGS, Musicnn

NAMED = sorted({*sum(TAGS.values(), [])})
LEAST = 4  # clips that name a tag, and that do not, for its AUC to count


class Ear:
    """musicnn, with the interface of toy.judge.Judge as far as FD needs it."""

    names = dict(fd="FD_musicnn")
    settings = "musicnn, FD of MTT's 200 numbers for every 3 s, AUC of both networks' tags"

    def __init__(self):
        self.musicnn = Musicnn()

    def listen(self, clips):
        """clips: an iterable of audio (S,) -> frames [(n, 200)] and tags (N, tags) of each"""
        heard = [self.musicnn.listen(audio) for audio in clips]
        tags = np.array([[scores[tag] for tag in NAMED] for _, scores in heard])
        return SimpleNamespace(frames=[frames for frames, _ in heard], tags=tags)

    def cells(self, heard, captions) -> dict:
        """{"AUC": its mean over tags, tag: its AUC}, of the tags that enough captions name"""
        plain = lambda text: f" {re.sub('[^a-z0-9]+', ' ', text.lower())} "
        named = np.array([[plain(tag) in plain(c) for tag in NAMED] for c in captions])
        counts = named.sum(0)
        asked = np.flatnonzero((counts >= LEAST) & (counts <= len(captions) - LEAST))
        if not len(asked):
            return {}
        both = np.stack([heard.tags[:, asked], named[:, asked]], 2)  # (N, tags, 2)
        mean = lambda clips: np.mean([auc(*clips[:, i].T) for i in range(len(asked))])
        cells = {"AUC": evaluate.Cell(mean(both), *evaluate.interval(both, mean))}
        for i, tag in enumerate(asked):
            cells[f"{NAMED[tag]} ({counts[tag]})"] = evaluate.Cell(auc(*both[:, i].T))
        return cells


def auc(scores, named):
    """Area under the ROC curve: the share of pairs in which the named clip scores higher, ties
    count half; 0.5 if all or none are named"""
    yes, no = scores[named == 1][:, None], scores[named == 0]
    return ((yes > no) + 0.5 * (yes == no)).mean() if yes.size and no.size else 0.5


def ask_toy(ear, codec, count, kinds) -> dict:
    """Fields of an evaluate.Task: what toy.questions asks, but musicnn listens to the real clips,
    which are composed and rendered again, as many others as the reference."""
    from toy import corpus, questions

    heard = ear.listen(corpus.play_clips(range(0, 2 * count * corpus.VALID, corpus.VALID)))
    asked = questions.ask(codec, count, kinds)
    count = len(asked["codes"])  # it has so many at most
    real = dict(real=first(heard, count), reference=torch.cat(heard.frames[count:]))
    about = f"{count} held-out clips of the toy world; reference: {count} others"
    return asked | real | dict(name="toy-musicnn", about=about, factors=None, repeated=None)


def first(heard, count):
    return SimpleNamespace(frames=heard.frames[:count], tags=heard.tags[:count])


def ask(ear, codec, folder, count, seconds) -> dict:
    """Fields of an evaluate.Task, from the held-out clips of a data folder: `count` of them are
    described by the prompts, as many others are the reference."""
    clips = Clips(folder, "valid", codec.codebooks, codec.name)
    if not {"path", "start", "caption"} <= {*clips.rows[0]}:
        raise ValueError(f"{folder} was not made from audio files by data.py")
    frames = int(seconds * codec.sample_rate / codec.hop)
    rows = np.random.default_rng(0).permutation(len(clips))
    rows = [i for i in rows if clips.rows[i]["frames"] >= frames][: 2 * count]
    count = min(count, len(rows) // 2)
    if count < 2:
        raise ValueError(f"{folder} has {len(rows)} held-out clips of {seconds:g} s: 4 are needed")
    heard = ear.listen(original(clips.rows[i], seconds) for i in rows)
    return dict(
        name=Path(folder).name,
        about=f"{count} held-out clips of {Path(folder).name}; reference: {len(rows) - count}"
        " others",
        prompts={"caption": [clips.rows[i]["caption"] for i in rows[:count]]},
        codes=np.stack([clips.codes(i, 0, frames) for i in rows[:count]]),
        real=first(heard, count),
        reference=torch.cat(heard.frames[count:]),
        training=Clips(folder, "train", 1),
    )


def original(row, seconds):
    """The beginning (S,) of a clip, from its file"""
    size = round(seconds * SAMPLE_RATE)
    start, parts = round(row["start"] * SAMPLE_RATE), []
    for block in audio_blocks(row["path"]):
        parts.append(block[max(start, 0) :])
        start -= len(block)
        if sum(map(len, parts)) >= size:
            break
    return np.concatenate(parts)[:size]
