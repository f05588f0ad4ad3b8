"""The corpus that ships here, and how it is made."""

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
from data import Writer
from text import TextEncoder
from toy.songbook import MIXTURES, sample_clip

HERE = Path(__file__).parent
TOKENIZER = HERE / "tokenizer.json"
TEXT = HERE / "text.safetensors"
PACKED = HERE / "corpus.tar.xz"
UNPACKED = HERE.parent / "data" / "toy"
SECONDS = 10.0  # of a clip
AT_ONCE = 128  # clips that one fluidsynth plays
VALID = 16  # one clip in so many is for validation


def folder() -> Path:
    """The data folder of the corpus that ships here, unpacked on first use."""
    if not (UNPACKED / "manifest.jsonl").exists():
        if not PACKED.exists():
            raise ValueError(f"no {PACKED}: `git checkout -- toy/{PACKED.name}` restores it")
        temporary = UNPACKED.with_name(f"toy.{os.getpid()}")
        with tarfile.open(PACKED) as tar:
            # Debian's Python 3.11.2 has no filters yet, and takes no argument of that name.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(temporary)
        try:
            os.replace(temporary, UNPACKED)
        except OSError:  # another process was quicker; or a build ended before its first clips
            shutil.rmtree(temporary)
            if not (UNPACKED / "manifest.jsonl").exists():
                raise ValueError(f"{UNPACKED} is an unfinished corpus: remove it") from None
    return UNPACKED


def play_clips(indices, split_seed=0, seconds=SECONDS, mixtures=MIXTURES) -> list[np.ndarray]:
    from toy.band import render_many
    from toy.composer import compose

    clips = [sample_clip(i, split_seed, mixtures) for i in indices]
    return render_many([compose(*clip, seconds) for clip in clips], seconds)


def play_and_encode(indices, seconds, mixtures) -> np.ndarray:
    """Clips of these indices as codes (clips, 9, T), in a process of its own."""
    torch.set_num_threads(1)
    audio = torch.from_numpy(np.stack(play_clips(indices, seconds=seconds, mixtures=mixtures)))
    return load_codec("toy").encode(audio).numpy().astype(np.uint16)


def text_encoder():
    """The small T5 that ships here: it knows the words of this world, as Flan-T5 knows English."""
    encoder = TextEncoder.small(TOKENIZER.read_text())
    load_weights(encoder.encoder, TEXT)
    return encoder


def write_corpus(
    folder: Path, clips: int, full: int, seconds: float, mixtures: float, workers: int
):
    """Renders and encodes clips 0 ... `clips` - 1 into a data folder: all nine codebooks of the
    first `full` clips, the first codebook alone of the others. Goes on where it was stopped."""
    writer = Writer(folder, load_codec("toy"))
    todo = range(len(writer.rows()), clips)
    parts = [todo[i : i + AT_ONCE] for i in range(0, len(todo), AT_ONCE)]
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(partial(play_and_encode, seconds=seconds, mixtures=mixtures), parts)
        encoded = tqdm(made, "corpus", len(parts), unit_scale=AT_ONCE)
        for part, codes in zip(parts, encoded):
            rows = [
                dict(
                    split="train" if i % VALID else "valid",
                    factors=sample_clip(i, mixtures=mixtures)[0],
                )
                for i in part
            ]
            writer.add([(c if i < full else c[:1], row) for i, c, row in zip(part, codes, rows)])
