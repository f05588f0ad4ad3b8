"""The toy world: music written and played by a program, with captions that are true.

    factors --compose--> notes --render_many--> audio --codec--> codes
    factors --caption--> text

python -m toy listen --n 8 --out toy-clips   plays some clips: wav files, factors, captions
python -m toy build                          makes codec, tokenizer, text encoder and corpus again
python -m toy build --corpus-only --clips 20000 --out data/toy-large    makes a larger corpus
python -m toy judge                          trains the judge again
python -m toy ship out/simba/best            installs a checkpoint as the default model

All but `ship` need fluidsynth: apt-get install fluidsynth fluidr3mono-gm-soundfont
"""

import lzma
import os
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
from audio import write_audio
from diffusion import is_refiner, load_refiner
from options import add_arguments, check_value, entry, new_parser, option
from sample import Sampling
from text import TextEncoder
from toy import corpus
from toy.codec import ToyCodec
from toy.corpus import HERE, SECONDS, UNPACKED
from toy.songbook import GENRES, LEADS, MIXTURES, MOODS, TEMPI, sample_clip, sample_factors
from toy.words import caption


@dataclass
class ListenOptions:
    n: int = option(8, "number of clips", "[1, inf)")
    first: int = option(0, "index of the first clip", "[0, inf)")
    seconds: float = option(SECONDS, "length of a clip", "(0, 600]")
    out: str = option("toy-clips", "folder for the wav files")


def listen(args):
    """Plays some clips to wav files and prints their factors and captions."""
    clips = range(args.first, args.first + args.n)
    for index, audio in zip(clips, corpus.play_clips(clips, seconds=args.seconds)):
        factors = sample_clip(index)[0]
        genres = [factors["genre"], factors["rhythm"]]
        name = "-".join(genre for genre in genres if genre).replace(" ", "-")
        path = Path(args.out) / f"{index:05d}-{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, audio)
        print(f"{path}  {factors}")
        rng = np.random.default_rng(index)
        for length in ("words", "sentence", "paragraph"):
            print("   ", caption(factors, rng, length))


@dataclass
class BuildOptions:
    clips: int = option(6144, "clips of the corpus", "[1, inf)")
    full: int = option(1024, "clips with all nine codebooks", "[0, inf)")
    codec_clips: int = option(320, "clips that the codec is fitted to", "[1, inf)")
    seconds: float = option(SECONDS, "length of a clip", "(0, 600]")
    # Waltzes never mix, and they are one clip in twenty.
    mixtures: float = option(MIXTURES, "share of clips that mix two genres", "[0, 0.95]")
    corpus_only: bool = option(False, "keep codec, tokenizer and text encoder as they are")
    out: str = option(str(UNPACKED), "data folder; the default is also packed, to ship")
    workers: int = option(os.cpu_count() or 1, "processes", "[1, inf)")


def build(args):
    """Makes the toy world from nothing: codec, tokenizer, text encoder, corpus."""
    out = Path(args.out)
    ships = out.resolve() == UNPACKED.resolve()
    if ships and (args.seconds, args.mixtures) != (SECONDS, MIXTURES):
        raise ValueError("clips of another length or share of mixtures do not ship: set --out")
    if not args.corpus_only:
        if (out / "manifest.jsonl").exists():
            raise ValueError(
                f"{out} holds clips of the codec that would be replaced: remove it, or continue it"
                " with --corpus-only"
            )
        fit_codec(args.codec_clips, args.workers)
        train_tokenizer()
        train_text_encoder()
    corpus.write_corpus(out, args.clips, args.full, args.seconds, args.mixtures, args.workers)
    if ships:
        # lp=1: the codes are pairs of bytes, and their high bytes resemble each other.
        filters = [dict(id=lzma.FILTER_LZMA2, preset=9, lp=1, lc=3, pb=1)]
        with lzma.open(corpus.PACKED, "w", filters=filters) as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for path in sorted(out.iterdir()):
                    tar.add(path, path.name)
        print(f"{corpus.PACKED}: {corpus.PACKED.stat().st_size / 1e6:.1f} MB")


def fit_codec(clips: int, workers: int):
    """Fits the toy codec to clips that are in no corpus (split seed 1); saves it to toy/codec."""
    with ProcessPoolExecutor(workers) as pool:
        parts = [range(i, min(i + corpus.AT_ONCE, clips)) for i in range(0, clips, corpus.AT_ONCE)]
        played = tqdm(pool.map(corpus.play_clips, parts, [1] * len(parts)), "codec", len(parts))
        audio = [clip for part in played for clip in part]
    ToyCodec.fit(audio).save(HERE / "codec")


def train_tokenizer(captions: int = 20000, entries: int = 1000):
    """A byte-level BPE: the captions' words are single tokens, and any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=entries, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rng = np.random.default_rng(2)
    texts = (caption(sample_factors(rng), rng) for _ in range(captions))
    tokenizer.train_from_iterator(texts, trainer)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer.save(str(corpus.TOKENIZER))


def train_text_encoder(steps: int = 1000, batch: int = 64, lr: float = 3e-3):
    """Trains a new T5 to name a clip's factors from its captions. It learns nothing of music."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    encoder = TextEncoder.small(corpus.TOKENIZER.read_text(encoding="utf-8")).train()
    answers = dict(genre=[*GENRES], rhythm=[None, *GENRES], lead=[*LEADS], mood=[*MOODS])
    answers["tempo"] = TEMPI
    sizes = {name: len(values) for name, values in answers.items()}
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(encoder.d_text, n) for k, n in sizes.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    bar = tqdm(range(steps), "text encoder")
    for _ in bar:
        factors = [sample_factors(rng) for _ in range(batch)]
        text = encoder.pooled([caption(f, rng) for f in factors])
        loss = 0.0
        for name, values in answers.items():
            target = torch.tensor([values.index(f[name]) for f in factors])
            loss = loss + F.cross_entropy(heads[name](text), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    weights = encoder.encoder.state_dict()
    weights.pop("encoder.embed_tokens.weight", None)  # another name of shared.weight
    checkpoint.write_tensors(corpus.TEXT, weights, dtype=torch.half)


@dataclass
class JudgeOptions:
    clips: int = option(4352, "clips to learn from", "[64, inf)")
    workers: int = option(os.cpu_count() or 1, "processes", "[1, inf)")


def judge(args):
    """Trains the judge again, on clips of its own."""
    from toy.judge import build

    build(args.clips, args.workers)


@dataclass
class ShipOptions(Sampling):
    steps: int = option(25, "steps of a refiner", "[1, inf)")
    sketch_guidance: float = option(2.0, "how strictly to follow codebook 1", "[0, 100]")


def ship(args):
    """Installs a checkpoint as the default model, in half precision, with its sampling options."""
    config = checkpoint.read_config(args.checkpoint)
    missing = {"train", "step", "best", "codec"} - set(config)
    if missing:
        raise ValueError(f"{args.checkpoint} was not made by train.py: it has no {min(missing)!r}")
    if is_refiner(config):
        model, out = load_refiner(args.checkpoint), HERE / "refiner"
        options = ("steps", "guidance", "sketch_guidance")
    else:
        model, out = checkpoint.load_checkpoint(args.checkpoint), HERE / "lm"
        options = [item.name for item in fields(Sampling)]
    sampling = {name: getattr(args, name) for name in options}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    # Folders and devices mean nothing on another machine.
    known = lambda value: not isinstance(value, str) or value == "toy"
    extra = {key: config[key] for key in ("step", "best", "codec")}
    extra["train"] = {key: value for key, value in config["train"].items() if known(value)}
    extra["sampling"] = (config.get("sampling") or {}) | sampling
    encoder = checkpoint.load_text_encoder(args.checkpoint)
    if Path(encoder.name).is_dir():
        raise ValueError(f"its text encoder is a folder that only you have, {encoder.name}")
    checkpoint.save_checkpoint(out, model, encoder, extra, dtype=torch.float16)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


def main():
    sys.argv[0] = "python -m toy"  # its name in messages
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    for run, options in (
        (listen, ListenOptions), (build, BuildOptions), (judge, JudgeOptions), (ship, ShipOptions),
    ):  # fmt: skip
        command = commands.add_parser(run.__name__, help=run.__doc__, allow_abbrev=False)
        add_arguments(command, options)
        command.set_defaults(run=run, options=options)
        if run is ship:
            command.add_argument("checkpoint", help="its folder, such as out/simba/best")
            command.set_defaults(**{item.name: None for item in fields(options)})  # if not given
    args = parser.parse_args()
    for item in fields(args.options):
        check_value(item.name, getattr(args, item.name), item.metadata["valid"])
    args.run(args)


if __name__ == "__main__":
    entry(main)
