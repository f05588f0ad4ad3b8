"""The toy world: music written and played by a program, with captions that are true.

    factors --compose--> notes --render_many--> audio --codec--> codes
    factors --caption--> text

python -m toy listen                         plays eight clips: wav files, factors, captions
python -m toy build                          makes codec, tokenizer, text encoder and corpus again
python -m toy build --corpus-only --clips 20000 --out data/toy-large    makes a larger corpus
python -m toy judge                          trains the judge again
python -m toy ship out/simba/best            installs a checkpoint as the default model

All but `ship` need fluidsynth: apt-get install fluidsynth fluidr3mono-gm-soundfont
"""

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
from text import TextEncoder
from toy import codec, corpus, judge
from toy.questions import as_asked
from toy.songbook import MIXTURES, sample_clip, sample_factors
from toy.words import LENGTHS, caption


def listen(_):
    """Plays eight clips to toy-clips/ and prints their factors and captions."""
    Path("toy-clips").mkdir(exist_ok=True)
    for index, audio in enumerate(corpus.play_clips(range(8))):
        factors, rng = sample_clip(index)[0], np.random.default_rng(index)
        path = Path("toy-clips", f"{index}-{factors['genre'].replace(' ', '-')}.wav")
        write_audio(path, audio)
        print(path, factors, *(caption(factors, rng, length) for length in LENGTHS), sep="\n    ")


@dataclass
class BuildOptions:
    clips: int = option(6144, "clips of the corpus", "[1, 1e9]")
    full: int = option(1024, "clips with all nine codebooks", "[0, 1e9]")
    # Waltzes never mix, and they are one clip in twenty.
    mixtures: float = option(MIXTURES, "share of clips that mix two genres", "[0, 0.95]")
    corpus_only: bool = option(False, "keep codec, tokenizer and text encoder as they are")
    out: str = option(str(corpus.UNPACKED), "data folder; the default is also packed, to ship")


def build(args):
    """Makes the toy world from nothing: codec, tokenizer, text encoder, corpus."""
    for item in fields(BuildOptions):
        check_value(item.name, getattr(args, item.name), item.metadata["valid"])
    out = Path(args.out)
    if not args.corpus_only:
        if out.resolve() != corpus.UNPACKED.resolve():
            raise ValueError("--out needs --corpus-only: codec and tokenizer are those that ship")
        if (out / "manifest.jsonl").exists():
            why = "holds clips of the codec that would be replaced"
            raise ValueError(f"{out} {why}: remove it, or continue it with --corpus-only")
        play = partial(corpus.play_clips, split_seed=1)  # clips that are in no corpus
        played = corpus.in_processes(play, range(320), "codec")
        fitted = codec.ToyCodec.fit([clip for _, part in played for clip in part])
        checkpoint.write_tensors(codec.FILE, fitted.state_dict(), dtype=torch.half)
        train_tokenizer()
        train_text_encoder()
    corpus.write_corpus(out, args.clips, args.full, args.mixtures)
    if out.resolve() == corpus.UNPACKED.resolve():
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
    sizes = {name: len(values) for name, values in judge.FACTORS.items() if name != "key"}
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(encoder.d_text, n) for k, n in sizes.items()})

    def loss():
        factors = [sample_factors(rng) for _ in range(batch)]
        text, right = encoder.pooled([caption(f, rng) for f in factors]), judge.targets(factors)
        return sum(F.cross_entropy(head(text), right[k]) for k, head in heads.items())

    parameters = [*encoder.parameters(), *heads.parameters()]
    judge.minimize(loss, parameters, steps, lr, "text encoder")
    checkpoint.write_tensors(corpus.TEXT, encoder.encoder.state_dict(), dtype=torch.half)


def train_judge(_):
    """Trains the judge again, on clips of its own."""
    heard = judge.build()
    factors = [sample_clip(corpus.VALID * i)[0] for i in range(len(heard.frames))]
    for factor, right in as_asked(heard.logits, factors).items():
        print(f"{factor:21} {right.mean():6.1%} of {len(right)} held-out clips")


def ship(args):
    """Installs a checkpoint as the default model, in half precision, with its sampling options."""
    config = checkpoint.read_config(args.checkpoint)
    if not {"train", "step", "best", "codec"} <= set(config):
        raise ValueError(f"{args.checkpoint} was not made by train.py")
    load, out = checkpoint.load_checkpoint, corpus.HERE / "lm"
    if is_refiner(config):
        load, out = load_refiner, corpus.HERE / "refiner"
    encoder = checkpoint.load_text_encoder(args.checkpoint)
    if Path(encoder.name).is_dir():
        raise ValueError(f"its text encoder is a folder that only you have, {encoder.name}")
    extra = {k: config[k] for k in ("step", "best", "codec", "sampling") if k in config}
    # Folders and devices mean nothing on another machine.
    train = config["train"].items()
    extra["train"] = {k: v for k, v in train if not isinstance(v, str) or v == "toy"}
    checkpoint.save_checkpoint(out, load(args.checkpoint), encoder, extra, dtype=torch.float16)
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


def main():
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run in dict(listen=listen, build=build, judge=train_judge, ship=ship).items():
        command = commands.add_parser(name, help=run.__doc__, allow_abbrev=False)
        command.set_defaults(run=run)
        if run is build:
            add_arguments(command, BuildOptions)
        if run is ship:
            command.add_argument("checkpoint", help="its folder, such as out/simba/best")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    entry(main)
