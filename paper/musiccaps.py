"""The paper's test: MusicCaps prompts without vocals, MusicGen-small and its own figures."""

from pathlib import Path

import numpy as np
import soxr
import torch
from tqdm import tqdm

import evaluate
from audio import SAMPLE_RATE, read_audio
from checkpoint import load_checkpoint
from paper.captions import DEVICE, HERE, explained, read_rows
from paper.sources import read_musiccaps


def ask(ruler, codec, table, folder, seconds, count=None) -> dict:
    """Fields of an evaluate.Task: MusicCaps prompts; the reference is the clips they describe."""
    count = count or (200 if seconds <= 10 else 50)
    captions, audio = zip(*choose(table, folder, seconds, count))
    heard = ruler.listen(tqdm(audio, "real clips", disable=None))
    codes = [codec.encode(a[None])[0].numpy() for a in audio]  # (K, T), some a frame shorter
    shortest = min(c.shape[1] for c in codes)
    return dict(
        name="musiccaps",
        about=f"{count} MusicCaps prompts without vocal terms; reference: the clips they describe",
        prompts={"captions": [*captions]},
        codes=np.stack([c[:, :shortest] for c in codes]),
        real=heard,
        reference=torch.cat([*heard.frames]),
    )


def choose(table, folder, seconds, count, seed=0):
    """The first `count` clips of `read_musiccaps` that are long enough -> [(caption, audio (S,))].
    A clip may lack 0.1 s. ValueError if there are fewer."""
    chosen = []
    for _, caption, file in read_musiccaps(table, folder, seed):
        audio = read_audio(file)[0, : round(seconds * SAMPLE_RATE)]
        if len(audio) > (seconds - 0.1) * SAMPLE_RATE:
            chosen.append((caption, audio))
        if len(chosen) == count:
            return chosen
    found = f"{folder} has {len(chosen)} clips of {seconds:g} s whose captions name no vocals"
    raise ValueError(f"{found}, not {count}: download more, or take a smaller --count")


def musicgen(name, prompts, seconds, seeds):
    """MusicGen-small with its authors' settings: yields audio (S,), and none of our tokens."""
    from transformers import pipeline

    with explained(f"no weights: get https://huggingface.co/facebook/{name} with `hf download`"):
        player = pipeline("text-to-audio", f"facebook/{name}", device=DEVICE)
    options = dict(do_sample=True, guidance_scale=3.0, top_k=250, max_new_tokens=int(50 * seconds))
    for prompt, seed in zip(prompts, seeds):
        torch.manual_seed(seed)
        audio = player(prompt, generate_kwargs=options)["audio"]
        yield soxr.resample(audio.reshape(-1), 32000, SAMPLE_RATE), []


def add_published(table, number, seconds):
    """Adds columns to a table of evaluate.py: the parameters of each checkpoint, and the figures of
    the paper's Table `number` for the same variant, codebooks and blocks.

    They are in tables.csv, as VARIANT-CODEBOOKS-BLOCKS; 2b is Table II at 25 s.
    """
    number = "2b" if number == 2 and seconds > 10 else str(number)
    theirs = {r["system"]: r for r in read_rows(HERE / "tables.csv") if r["table"] == number}
    for row, cells in table.items():
        key = evaluate.stages(row.split(", ")[0])[0]
        if Path(key).exists() and evaluate.type_of(key) == "checkpoint":
            lm = load_checkpoint(key)
            cells["parameters, M"] = evaluate.Cell(sum(p.numel() for p in lm.parameters()) / 1e6)
            key = f"{lm.config.variant}-{lm.config.codebooks}-{lm.config.blocks}"
        for column in ("FD_openl3", "KL", "CLAP") if key in theirs else ():
            cells[f"{column}, paper"] = evaluate.Cell(float(theirs[key][column]))
