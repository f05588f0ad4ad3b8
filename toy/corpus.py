"""The corpus and the text encoder that ship with the toy world, and how more clips are made.

What plays music is imported where it is called, because training needs no MIDI.
"""

import os
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_weights
from codec import load_codec
from text import TextEncoder
from toy.songbook import MIXTURES, sample_clip

HERE = Path(__file__).parent
TOKENIZER = HERE / "tokenizer.json"
TEXT = HERE / "text.safetensors"
PACKED = HERE / "corpus.tar.xz"
UNPACKED = HERE.parent / "data" / "toy"
SECONDS = 10.0  # of a clip
AT_ONCE = 64  # clips that one fluidsynth plays
VALID = 16  # every sixteenth clip is for validation


def folder() -> Path:
    """The data folder of the shipped corpus, unpacked on first use."""
    if (UNPACKED / "manifest.jsonl").exists():
        return UNPACKED
    temporary = UNPACKED.with_name(f"toy.{os.getpid()}")
    with tarfile.open(PACKED) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not yet in Python 3.11.2
        tar.extractall(temporary)
    try:
        os.replace(temporary, UNPACKED)
    except OSError:  # another process was faster, or a build stopped before its first clips
        shutil.rmtree(temporary)
        if not (UNPACKED / "manifest.jsonl").exists():
            raise ValueError(f"{UNPACKED} is an unfinished corpus: remove it") from None
    return UNPACKED


def text_encoder() -> TextEncoder:
    """A small T5 that knows the words of the toy world, as Flan-T5 knows English."""
    encoder = TextEncoder.small(TOKENIZER.read_text(encoding="utf-8"))
    load_weights(encoder.encoder, TEXT)
    return encoder


def play_clips(indices, split_seed=0, seconds=SECONDS, mixtures=MIXTURES) -> list[np.ndarray]:
    """The audio (S,) of clips, float32, 44.1 kHz. ValueError if fluidsynth is missing."""
    from toy.band import render_many
    from toy.composer import compose

    clips = [sample_clip(i, split_seed, mixtures) for i in indices]
    return render_many([compose(*clip, seconds) for clip in clips], seconds)


def in_processes(work, clips, title):
    """Yields (indices, work(indices)) for AT_ONCE of the clips at a time, one process a core."""
    parts = [clips[i : i + AT_ONCE] for i in range(0, len(clips), AT_ONCE)]
    with ProcessPoolExecutor() as pool:
        yield from zip(tqdm(parts, title, unit_scale=AT_ONCE), pool.map(work, parts))


def play_and_encode(indices, mixtures) -> np.ndarray:
    """Clips as codes (clips, 9, T), made in a process of its own."""
    torch.set_num_threads(1)
    audio = torch.from_numpy(np.stack(play_clips(indices, mixtures=mixtures)))
    return load_codec("toy").encode(audio).numpy().astype(np.uint16)


def write_corpus(out, clips, full, mixtures):
    """Writes clips 0 ... `clips` - 1 to the data folder `out`: nine codebooks of the first `full`
    clips, one of the others. An interrupted corpus is continued."""
    from curate import Writer

    if (Path(out) / "plan.json").exists():
        raise ValueError(f"{out} holds other music, made by data.py: choose another --out")
    writer = Writer(out, load_codec("toy"))
    todo = range(len(writer.rows()), clips)
    for part, codes in in_processes(partial(play_and_encode, mixtures=mixtures), todo, "corpus"):
        rows = []
        for i, clip in zip(part, codes):
            factors = sample_clip(i, mixtures=mixtures)[0]
            row = dict(split="train" if i % VALID else "valid", factors=factors)
            rows.append((clip if i < full else clip[:1], row))
        writer.add(rows)
