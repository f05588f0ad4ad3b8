"""The toy world's music: a composer, a band, and someone who describes what they play.

A clip is made from a handful of *factors* (genre, rhythm, tempo, key, lead, mood) in three steps:

    factors --compose--> notes (pretty_midi) --render_many--> audio (fluidsynth)
    factors --caption--> text

All knowledge about music is in two tables: GENRES, a songbook with a page of tablature for each
genre, and MOODS, which bend whatever the songbook says: register, density, dynamics, mode, and one
voice or percussion of their own. A factor `rhythm` names a second genre whose drums, bass and feel
carry the first one's harmony, comping and lead: genre "jazz" with rhythm "reggae" is "jazz reggae".

Everything random comes from a generator seeded by the caller; a clip's index determines the clip.

    python -m toy listen --n 8 --out toy-clips     wav files, their factors and captions
    python -m toy build                            codec, tokenizer, text encoder and corpus, anew
    python -m toy build --corpus-only --clips 20000 --out data/toy-large      a larger corpus
    python -m toy ship out/simba/best              a trained model, made the one that ships

Units: pitches are MIDI numbers, times are seconds, and a *step* is a sixteenth note, the column of
the tablature. Loudness is in dB. A chord is (root above the tonic, its tones above the root).
"""

import argparse
import lzma
import os
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from audio import SAMPLE_RATE
from checkpoint import load_checkpoint, load_text_encoder, read_config, save_checkpoint
from diffusion import is_refiner, load_refiner
from options import entry
from text import TextEncoder
from toy.band import render_many
from toy.codec import ToyCodec
from toy.composer import compose
from toy.corpus import (
    AT_ONCE,
    HERE,
    PACKED,
    SECONDS,
    TEXT,
    TOKENIZER,
    UNPACKED,
    play_clips,
    write_corpus,
)
from toy.songbook import GENRES, LEADS, MIXTURES, MOODS, sample_clip, sample_factors
from toy.words import caption


def fit_codec(clips: int, workers: int):
    """Fits the toy codec to clips that no corpus has (split seed 1) and saves it to toy/codec."""
    with ProcessPoolExecutor(workers) as pool:
        parts = [range(i, min(i + AT_ONCE, clips)) for i in range(0, clips, AT_ONCE)]
        played = tqdm(pool.map(play_clips, parts, [1] * len(parts)), "codec", len(parts))
        audio = [clip for part in played for clip in part]
    ToyCodec.fit(audio).save(HERE / "codec")


def train_tokenizer(captions: int = 20000, entries: int = 1000):
    """A byte-level BPE of the captions' own words, so that any string can be encoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=entries,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(2)
    tokenizer.train_from_iterator(
        (caption(sample_factors(rng), rng) for _ in range(captions)), trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    tokenizer.save(str(TOKENIZER))


def train_text_encoder(steps: int = 1000, batch: int = 64, lr: float = 3e-3):
    """Teaches a new T5 to tell a clip's factors from its captions; it never meets music."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    encoder = TextEncoder.small(TOKENIZER.read_text()).train()
    answers = dict(genre=[*GENRES], rhythm=[None, *GENRES], lead=[*LEADS], mood=[*MOODS])
    answers["tempo"] = sorted({tempo for genre in GENRES.values() for tempo in genre.tempo})
    sizes = {name: len(values) for name, values in answers.items()}
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(encoder.d_text, n) for k, n in sizes.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), "text encoder")):
        factors = [sample_factors(rng) for _ in range(batch)]
        text, mask, _ = encoder([caption(f, rng) for f in factors])
        said = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = 0.0
        for name, values in answers.items():
            right = torch.tensor([values.index(f[name]) for f in factors])
            loss = loss + F.cross_entropy(heads[name](said), right)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    weights = {k: v.half() for k, v in encoder.encoder.state_dict().items()}
    weights.pop("encoder.embed_tokens.weight", None)  # another name of shared.weight
    save_file(weights, TEXT)


def build(args):
    """Makes the toy world from scratch: codec, tokenizer, text encoder, corpus."""
    if not 0 <= args.mixtures <= 0.95:  # waltzes, which never mix, are one in twenty
        raise ValueError(f"--mixtures is a share, of at most 0.95, not {args.mixtures:g}")
    other = (args.seconds, args.mixtures) != (SECONDS, MIXTURES)
    if other and Path(args.out).resolve() == UNPACKED.resolve():
        raise ValueError("clips of other lengths or mixtures do not ship: give an --out of its own")
    if not args.corpus_only:
        if (Path(args.out) / "manifest.jsonl").exists():
            raise ValueError(
                f"{args.out} holds clips of the codec that is to be made anew: remove it first, or"
                " go on with it by --corpus-only"
            )
        fit_codec(args.codec_clips, args.workers)
        train_tokenizer()
        train_text_encoder()
    write_corpus(Path(args.out), args.clips, args.full, args.seconds, args.mixtures, args.workers)
    if Path(args.out).resolve() == UNPACKED.resolve():
        # lp=1: the codes are pairs of bytes, and their high bytes resemble each other.
        filters = [dict(id=lzma.FILTER_LZMA2, preset=9, lp=1, lc=3, pb=1)]
        with (
            lzma.open(PACKED, "w", filters=filters) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for path in sorted(Path(args.out).iterdir()):
                tar.add(path, path.name)
        print(f"{PACKED}: {PACKED.stat().st_size / 1e6:.1f} MB")


def listen(args):
    """Renders some clips to wav files and prints what they are."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    clips = [sample_clip(args.first + i) for i in range(args.n)]
    started = time.perf_counter()
    sounds = render_many([compose(*clip, args.seconds) for clip in clips], args.seconds)
    spent = time.perf_counter() - started
    for i, ((factors, _), sound) in enumerate(zip(clips, sounds), start=args.first):
        which = "-".join(filter(None, [factors["genre"], factors["rhythm"]])).replace(" ", "-")
        path = folder / f"{i:05d}-{which}.wav"
        soundfile.write(path, sound, SAMPLE_RATE)
        print(f"{path}  {factors}")
        rng = np.random.default_rng(i)
        for length in ("words", "sentence", "paragraph"):
            print("   ", caption(factors, rng, length))
    print(f"{args.n * args.seconds:.0f} s of music in {spent:.1f} s", file=sys.stderr)


def ship(args):
    """Makes a checkpoint the one that ships: in half precision, with its sampling options."""
    config = read_config(args.checkpoint)
    kept = {k: config[k] for k in ("train", "step", "best", "codec")}
    if is_refiner(config):
        load, folder = load_refiner, HERE / "refiner"
        options = ("steps", "guidance", "sketch_guidance")
    else:
        load, folder = load_checkpoint, HERE / "lm"
        options = ("guidance", "temperature", "top_k", "top_p")
    given = {option: getattr(args, option) for option in options}
    kept["sampling"] = {k: v for k, v in given.items() if v is not None}
    parts = load(args.checkpoint), load_text_encoder(args.checkpoint)
    save_checkpoint(folder, *parts, kept, dtype=torch.float16)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("listen", help=listen.__doc__)
    c.add_argument("--n", type=int, default=8, help="number of clips")
    c.add_argument("--first", type=int, default=0, help="index of the first clip")
    c.add_argument("--seconds", type=float, default=SECONDS, help="length of a clip")
    c.add_argument("--out", default="toy-clips", help="folder for the wav files")
    c.set_defaults(run=listen)
    c = commands.add_parser("build", help=build.__doc__)
    c.add_argument("--clips", type=int, default=6144, help="clips of the corpus [6144]")
    c.add_argument("--full", type=int, default=1024, help="clips with all nine codebooks [1024]")
    c.add_argument(
        "--codec-clips", type=int, default=320, help="clips the codec is fitted to [320]"
    )
    c.add_argument("--seconds", type=float, default=SECONDS, help="of a corpus' clip [10]")
    c.add_argument(
        "--mixtures", type=float, default=MIXTURES, help=f"share of mixed genres [{MIXTURES}]"
    )
    c.add_argument("--corpus-only", action="store_true", help="keep all but the corpus")
    c.add_argument("--out", default=str(UNPACKED), help="data folder; the default is packed, too")
    c.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    c.set_defaults(run=build)
    c = commands.add_parser("ship", help=ship.__doc__)
    c.add_argument("checkpoint", help="folder of a checkpoint, such as out/simba/best")
    for option in ("guidance", "temperature", "top-p"):
        c.add_argument(f"--{option}", type=float, help="[as sample.py has it]")
    c.add_argument("--top-k", type=int, help="[as sample.py has it]")
    c.add_argument("--steps", type=int, help="of a refiner [as sample.py has it]")
    c.add_argument("--sketch-guidance", type=float, help="of a refiner [as `refine` has it]")
    c.set_defaults(run=ship)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    entry(main)
