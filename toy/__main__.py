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

import os
import sys
import tarfile
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing

import checkpoint
from audio import write_audio
from diffusion import is_refiner, load_refiner
from options import add_arguments, check_value, entry, new_parser, option
from sample import Sampling
from text import TextEncoder
from toy import corpus, judge
from toy.codec import FILE, ToyCodec
from toy.corpus import HERE, SECONDS, UNPACKED
from toy.questions import as_asked
from toy.songbook import GENRES, MIXTURES, sample_clip, sample_factors
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
        genres = filter(None, [factors["genre"], factors["rhythm"]])
        path = Path(args.out, f"{index:05d}-{'-'.join(genres).replace(' ', '-')}.wav")
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
        play = partial(corpus.play_clips, split_seed=1)  # clips that are in no corpus
        played = corpus.in_processes(play, range(args.codec_clips), args.workers, "codec")
        codec = ToyCodec.fit([clip for _, part in played for clip in part])
        checkpoint.write_tensors(FILE, codec.state_dict(), dtype=torch.half)
        train_tokenizer()
        train_text_encoder()
    corpus.write_corpus(out, args.clips, args.full, args.seconds, args.mixtures, args.workers)
    if ships:
        with tarfile.open(corpus.PACKED, "w:xz", preset=9) as tar:
            for path in sorted(out.iterdir()):
                tar.add(path, path.name)
        print(f"{corpus.PACKED}: {corpus.PACKED.stat().st_size / 1e6:.1f} MB")


def train_tokenizer(captions: int = 20000, entries: int = 1000):
    """A byte-level BPE: the captions' words are single tokens, and any text can be encoded."""
    rng = np.random.default_rng(2)
    texts = (caption(sample_factors(rng), rng) for _ in range(captions))
    tokenizer = ByteLevelBPETokenizer(lowercase=True, add_prefix_space=True)
    special = ["<pad>", "</s>"]
    tokenizer.train_from_iterator(texts, entries, 0, show_progress=False, special_tokens=special)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer.save(str(corpus.TOKENIZER))


def train_text_encoder(steps: int = 1000, batch: int = 64, lr: float = 3e-3):
    """Trains a new T5 to name a clip's factors from its captions. It learns nothing of music."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    encoder = TextEncoder.small(corpus.TOKENIZER.read_text(encoding="utf-8")).train()
    answers = {k: v for k, v in judge.FACTORS.items() if k != "key"}
    answers["rhythm"] = [None, *GENRES]
    sizes = {name: len(values) for name, values in answers.items()}
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(encoder.d_text, n) for k, n in sizes.items()})

    def loss():
        factors = [sample_factors(rng) for _ in range(batch)]
        text = encoder.pooled([caption(f, rng) for f in factors])
        targets = {k: torch.tensor([v.index(f[k]) for f in factors]) for k, v in answers.items()}
        return sum(F.cross_entropy(heads[k](text), target) for k, target in targets.items())

    parameters = [*encoder.parameters(), *heads.parameters()]
    judge.minimize(loss, parameters, steps, lr, "text encoder")
    checkpoint.write_tensors(corpus.TEXT, encoder.encoder.state_dict(), dtype=torch.half)


@dataclass
class JudgeOptions:
    clips: int = option(4352, "clips to learn from", "[64, inf)")
    workers: int = option(os.cpu_count() or 1, "processes", "[1, inf)")


def train_judge(args):
    """Trains the judge again, on clips of its own."""
    heard = judge.build(args.clips, args.workers)
    factors = [sample_clip(corpus.VALID * i)[0] for i in range(len(heard.frames))]
    for factor, right in as_asked(heard.logits, factors).items():
        print(f"{factor:21} {right.mean():6.1%} of {len(right)} held-out clips")


@dataclass
class ShipOptions(Sampling):
    steps: int = option(25, "steps of a refiner", "[1, inf)")
    sketch_guidance: float = option(2.0, "how strictly to follow codebook 1", "[0, 100]")


def ship(args):
    """Installs a checkpoint as the default model, in half precision, with its sampling options."""
    config = checkpoint.read_config(args.checkpoint)
    if not {"train", "step", "best", "codec"} <= set(config):
        raise ValueError(f"{args.checkpoint} was not made by train.py")
    if is_refiner(config):
        model, out = load_refiner(args.checkpoint), HERE / "refiner"
        options = ("steps", "guidance", "sketch_guidance")
    else:
        model, out = checkpoint.load_checkpoint(args.checkpoint), HERE / "lm"
        options = [item.name for item in fields(Sampling)]
    given = {name: getattr(args, name) for name in options}
    given = {name: value for name, value in given.items() if value is not None}
    extra = {key: config[key] for key in ("step", "best", "codec")}
    # Folders and devices mean nothing on another machine.
    train = config["train"].items()
    extra["train"] = {k: v for k, v in train if not isinstance(v, str) or v == "toy"}
    extra["sampling"] = (config.get("sampling") or {}) | given
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
    for name, run, options in (
        ("listen", listen, ListenOptions),
        ("build", build, BuildOptions),
        ("judge", train_judge, JudgeOptions),
        ("ship", ship, ShipOptions),
    ):
        command = commands.add_parser(name, help=run.__doc__, allow_abbrev=False)
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
