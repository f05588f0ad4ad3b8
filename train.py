"""Trains a language model or a refiner: one loop, read from top to bottom.

    python train.py --variant simba                      the toy world: a laptop, minutes, offline
    python train.py --variant simba --codebooks 9        a single stage, all codebooks at once
    python train.py --variant refiner                    the second stage of two
    python train.py --variant simba --preset paper --data data/jamendo
    python train.py --variant simba --preset paper --dry-run     what that would cost
    torchrun --nproc_per_node=4 train.py ...                     on four cards
    python train.py --resume out/simba                           continues a stopped run

A run is a folder: last/ and best/ (checkpoint.py), log.jsonl, loss.png and two samples; with
--keep-every N also step-N/, step-2N/, ...
"""

import functools
import hashlib
import json
import math
import sys
import time
import tomllib
from argparse import Namespace
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import checkpoint
import sample
import ssd_kernel
from audio import FRAME_RATE, lock_folder, write_text
from codec import load_codec
from data import Clips, caption_of, data_folder, shape_at, share
from diffusion import Refiner, RefinerConfig, is_refiner, load_refiner, refiner_loss, teacher
from model import VARIANTS, LMConfig, MusicLM
from options import add_arguments, check, entry, finish_step_on_signals, flag, new_parser, option
from paper import budget, figures
from paper.distributed import Processes
from sample import ahead, multiplies_bf16
from text import TextEncoder

ROOT = Path(__file__).parent


@dataclass
class TrainConfig:
    """How to train. The defaults are the paper's (SSMTTM, IV-A)."""

    data: str = option("toy", "data folder made by data.py, or toy: the one that ships")
    out: str = option("", "the run's folder; empty: out/VARIANT")
    init_from: str = option("", "fine-tune this checkpoint; toy: the one that ships")
    distill: bool = option(False, "of a refiner: learn to play --init-from's guidance in one pass")
    text_encoder: str = option("google/flan-t5-base", "a published T5; toy: the one that ships")
    train_text_encoder: float = option(0.0, "its own learning rate; 0: frozen", "[0, 1e9]")
    steps: int = option(100_000, "optimizer steps", "[1, 1e9]")
    seconds: float = option(30.0, "length of a training clip", "(0, 3600]")
    batch: int = option(4, "clips in a micro-batch", "[1, 1e9]")
    accumulate: int = option(32, "micro-batches in a step", "[1, 1e9]")
    crop: float = option(30.0, "start with clips of this many seconds, then double", "(0, 3600]")
    crop_until: float = option(0.0, "share of the steps until clips are whole", "[0, 1]")
    lr: float = option(1e-4, "learning rate after the warm-up; then a cosine to 0", "(0, 1]")
    warmup: int = option(100, "steps of linear warm-up", "[0, 1e9]")
    beta2: float = option(0.999, "AdamW's second beta", "[0, 1)")
    weight_decay: float = option(2e-2, "on matrices only", "[0, 1]")
    clip: float = option(1.0, "largest norm of the gradient", "(0, 1e9]")
    label_smoothing: float = option(0.0, "in training, not in validation", "[0, 1)")
    caption_dropout: float = option(0.1, "share of captions replaced by the empty one", "[0, 1]")
    ema: float = option(0.0, "decay of the averaged weights that are kept; 0: none", "[0, 1)")
    seed: int = option(0, "of weights, data order, captions and dropout", "[0, 4294967296)")
    valid_every: int = option(1000, "steps between validations (and checkpoints)", "[1, 1e9]")
    valid_clips: int = option(256, "clips of a validation", "[1, 1e9]")
    keep_every: int = option(0, "also keep every so many steps as step-N; 0: none", "[0, 1e9]")
    compile: bool = option(True, "torch.compile: faster after a minute or two")
    recompute: int = option(0, "blocks recomputed in the backward pass", "[0, 1e9]")
    fsdp: bool = option(False, "under torchrun: shard the weights")
    device: str = option("", "empty: cuda where there is one, else cpu", ["", "cpu", "cuda", "mps"])

    def __post_init__(self):
        check(self)
        if self.keep_every % self.valid_every:
            raise ValueError(f"--keep-every must be a multiple of --valid-every {self.valid_every}")
        if self.distill and not self.init_from:
            raise ValueError("--distill needs --init-from, a refiner that was trained before")
        if self.fsdp and (self.ema or self.train_text_encoder):
            raise ValueError("--fsdp needs a frozen text encoder and no --ema")


PRESETS = tomllib.loads((ROOT / "presets.toml").read_text(encoding="utf-8"))


def main(argv=None):
    model_config, config, run, dry = parse_arguments(argv)
    processes = Processes(config.device)
    if dry:
        return print(budget.report(model_config, config, processes.device))
    train(model_config, config, run, processes)
    processes.end()
    if processes.rank == 0:
        models = ["--checkpoint", str(run / "best")]
        if isinstance(model_config, RefinerConfig):
            codec = checkpoint.read_config(run / "best")["codec"]
            first = sample.newest_checkpoint(codec=codec)
            if checkpoint.read_config(first)["codec"] != codec:
                return print(f"To hear it, train a language model of the codec {codec}.")
            models = ["--checkpoint", str(first), "--refiner", str(run / "best")]
        sample.main([*sample.SHOWCASE, *models, "--out", str(run)])


# ------------------------------------------------------------------------------------ the loop ----


def train(model_config, config, run, processes):
    """Trains to the end, or continues where `run` stopped.

    Every random choice is a function of the seed, the step and the process, so that a resumed run
    repeats what an uninterrupted one does. ValueError, one sentence, for what the user can mend.
    """
    first = processes.rank == 0
    torch.manual_seed(config.seed)
    with processes.first_rank_first():
        data = Data(config, model_config, run)
        objective = Objective(*build(model_config, config, data), data.codec, config)
    lock = lock_folder(run) if first else nullcontext()
    objective.to(processes.device).train()
    wrapped = processes.wrap(objective, config.fsdp)
    trainer = Trainer(objective, config, run, data, processes)
    if config.compile:
        objective.model.compile(dynamic=False)
    log = Log(run / "log.jsonl", trainer.step, config.steps, first)
    if first:
        introduce(objective, config, data, processes.device)

    with lock, log.bar, finish_step_on_signals() as stop:
        if trainer.step % config.valid_every == 0 and log.rows and "right" not in log.rows[-1]:
            trainer.validate(log)  # the run was stopped before it could
        for step, parts in ahead(batches(data, config, trainer.step, processes)):
            started = time.time()
            chance = np.random.SeedSequence((config.seed, step, processes.rank))
            torch.manual_seed(int(chance.generate_state(1)[0]))
            frames, clips = shape_at(step, config)
            clips *= config.accumulate  # of all processes
            loss = add_gradients(wrapped, parts, clips, processes)
            loss, stopping = processes.agree(loss, stop.is_set())
            rate = learning_rate(step, config)
            norm = trainer.update(rate)
            if not math.isfinite(norm):
                log.print(f"step {step}: loss {loss}, gradient {norm}; step skipped")
            seconds = time.time() - started
            step += 1
            log.step(step, loss=loss, norm=norm, lr=rate, tokens=clips * frames, seconds=seconds)
            if stopping and step < config.steps:
                trainer.save("last")
                log.print(f"stopped at step {step}: `python train.py --resume {run}`")
                sys.exit(130)
            if step % config.valid_every == 0 or step == config.steps:
                trainer.validate(log)
    if first:
        figures.conclude(log, objective, run)


def add_gradients(wrapped, parts, clips, processes):
    """Forward and backward passes over a process's micro-batches -> its part of the step's loss.
    clips: of the step, in all processes."""
    loss = 0.0
    for i, (codes, captions) in enumerate(parts):
        weight = len(codes) * processes.ranks / clips  # DDP takes the mean over processes
        with processes.averaging(wrapped, last=i == len(parts) - 1):
            part = wrapped(codes.to(processes.device), captions) * weight
            part.backward()
        loss += part.item()
    return loss


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------- the data and the model ----


class Data:
    """What a run reads: the checkpoint that it starts from, if any; clips to train on and to
    validate on; their captions."""

    def __init__(self, config, model_config, run):
        self.refining = isinstance(model_config, RefinerConfig)
        self.describe = functools.partial(caption_of, refining=self.refining)
        self.resuming = begun(run)
        self.start = run / "last" if self.resuming else initial(config, self.refining)
        self.origin = checkpoint.read_config(self.start) if self.start else {}
        self.folder = data_folder(config.data)
        kind = model_config.codebooks, self.origin.get("codec")
        self.train = Clips(self.folder, "train", *kind)
        self.valid = Clips(self.folder, "valid", *kind)
        self.codec_name = self.train.meta["codec"]
        size = self.train.meta["codebook_size"]
        if size != model_config.codebook_size:
            has = f"the codebooks of {self.folder} have {size} entries"
            raise ValueError(f"{has}: --codebook-size must be {size}")
        self.codec = load_codec(self.codec_name) if self.refining else None
        self.fingerprint = hashlib.sha1((self.folder / "manifest.jsonl").read_bytes()).hexdigest()


def batches(data, config, first_step, processes):
    """Yields each step with the micro-batches of this process: codes (B, K, L) and B captions."""
    options = dict(seed=config.seed, describe=data.describe)
    options["caption_dropout"] = config.caption_dropout
    options["window"] = longest(config)  # a crop starts where the whole clip would
    for step in range(first_step, config.steps):
        parts = share(step, config, processes.rank, processes.ranks)
        yield step, [data.train.batch(*part, **options) for part in parts]


def longest(config):
    """Frames of the longest clips of a run, those at its end; validation reads as many at once."""
    return shape_at(config.steps - 1, config)[0]


def build(model_config, config, data):
    """-> the model and the text encoder, of the checkpoint that the run starts from, or new ones"""
    if data.start:
        model = (load_refiner if data.refining else checkpoint.load_checkpoint)(data.start)
        encoder = checkpoint.load_text_encoder(data.start)
    else:
        encoder = new_encoder(config.text_encoder)
        model_config.d_text = encoder.d_text
        model = Refiner(model_config) if data.refining else MusicLM(model_config)
        if data.refining:
            model.fit(data.codec)
    model.recompute = config.recompute
    encoder.requires_grad_(config.train_text_encoder > 0)
    return model, encoder


def new_encoder(name):
    if name != "toy":
        return TextEncoder.pretrained(name)
    from toy import corpus

    return corpus.text_encoder()


def initial(config, refining):
    """The checkpoint that a new run starts from, or "" for none."""
    shipped = ROOT / "toy" / ("refiner" if refining else "lm")
    return shipped if config.init_from == "toy" else config.init_from


def begun(run):
    """Whether the folder holds a run that can be resumed."""
    return (run / "last" / "trainer.safetensors").exists()


class Objective(nn.Module):
    """All that is trained, as one module: codes (B, K, L) and captions -> the loss."""

    def __init__(self, model, encoder, codec, config):
        super().__init__()
        self.model, self.encoder, self.config = model, encoder, config
        self.codec = codec  # of a refiner
        self.teacher = teacher(initial(config, True)) if config.distill else None

    def train(self, mode=True):
        super().train(mode)
        if not self.encoder.trained:
            self.encoder.eval()
        return self

    def to(self, device):
        if device.type == "cuda" and not self.encoder.trained and self.encoder.name != "small":
            self.encoder.bfloat16()  # a published, frozen encoder, which is not stored
        return super().to(device)

    def forward(self, codes, captions):
        both = self.model, self.encoder
        multiple = 64 if self.config.compile else 1  # so it is compiled for few lengths of text
        with autocast(codes.device):
            if self.codec:
                return refiner_loss(*both, self.codec, codes, captions, teacher=self.teacher)
            losses = token_losses(*both, codes, captions, self.config.label_smoothing, multiple)
        return losses.sum() / (codes != self.model.config.codebook_size).sum()


def token_losses(lm, encoder, codes, captions, label_smoothing=0.0, multiple=1):
    """Cross-entropies in nats (B,K,L) of codes given their captions, 0 at padding. multiple: the
    length of the text is rounded up to a multiple of it."""
    with nullcontext() if encoder.trained else torch.no_grad():
        text = encoder(captions, multiple=multiple)
    logits = lm(codes, *text)  # (B, K, L, V)
    losses = F.cross_entropy(
        logits.float().flatten(0, 2), codes.flatten(), reduction="none",
        ignore_index=lm.config.codebook_size, label_smoothing=label_smoothing,
    )  # fmt: skip
    return losses.view_as(codes)


def autocast(device):
    """bf16 matrix products over fp32 parameters, where the hardware has them. Pure bf16 weights
    diverge: the updates of a small learning rate are below their last digit."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


class Trainer:
    """The optimizer, the averaged weights if any, and the run's checkpoints."""

    def __init__(self, objective, config, run, data, processes):
        self.objective, self.config, self.run = objective, config, run
        self.data, self.processes = data, processes
        self.step = self.bad_steps = 0
        self.best = math.inf
        self.averaged = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.averaged = AveragedModel(objective.model, multi_avg_fn=average)
        self.kept = self.averaged.module if self.averaged else objective.model
        self.optimizer = make_optimizer(objective, config)
        self.trained = trained_parameters(objective)
        self.state = self.trained, self.optimizer, self.averaged
        if data.resuming:
            about = checkpoint.load_trainer(run / "last", *self.state, processes)
            if about["data"] != data.fingerprint:
                anew = f"restore it, or start a new run with --init-from {run}/best"
                raise ValueError(f"{data.folder} has changed since {run} began: {anew}")
            self.step, self.best = about["step"], about["best"]

    def update(self, rate):
        """A step of the optimizer, unless the gradient is not finite -> the gradient's norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip)
        norm = self.processes.whole(norm).item()
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        if self.bad_steps == 10:
            raise ValueError(f"10 bad steps in a row; last good checkpoint: {self.run}/last")
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        if math.isfinite(norm):
            self.optimizer.step()
            if self.averaged:
                self.averaged.update_parameters(self.objective.model)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    def validate(self, log):
        """Validates, and writes the checkpoints that are due."""
        scores = validate(self.kept, self.objective, self.data, self.config)
        loss = scores["right"]
        if not math.isfinite(loss):
            raise ValueError(f"training diverged: validation loss {loss}; try a smaller --lr")
        if loss < self.best:
            self.best = loss
            self.save("best")
        if self.config.keep_every and self.step % self.config.keep_every == 0:
            self.save(f"step-{self.step}")
        self.save("last")
        log.validation(self.step, scores)  # the last: where it is missing, a resumed run validates

    def save(self, name):
        """Writes the checkpoint run/NAME; "last" with what resuming needs. All ranks take part."""
        folder = self.run / name
        about = dict(step=self.step, best=self.best)
        # It plays with the options of what it started from. But a refiner that was distilled and is
        # trained on data again needs guidance again.
        sampling = self.data.origin.get("sampling", {})
        if self.config.distill:
            sampling = dict(steps=8, guidance=1.0, sketch_guidance=1.0, spread=1.3)
        elif self.data.refining and sampling.get("guidance") == 1:
            sampling = {}
        more = dict(train=asdict(self.config), codec=self.data.codec_name, sampling=sampling)
        weights = {k: self.processes.whole(v) for k, v in self.kept.state_dict().items()}
        try:
            if self.processes.rank == 0:
                parts = folder, self.kept, self.objective.encoder, about | more
                checkpoint.save_checkpoint(*parts, weights=weights)
                write_text(folder / "README.md", figures.card(self, PRESETS))
            if name == "last":
                about["data"] = self.data.fingerprint
                checkpoint.save_trainer(folder, *self.state, about, self.processes)
        except OSError as error:
            again = f"python train.py --resume {self.run}"
            raise ValueError(f"{error}: make room, then continue with `{again}`") from None


def make_optimizer(objective, config):
    """AdamW; weight decay for matrices only: not for biases, norms, A_log, D and dt_bias. The text
    encoder has its own learning rate."""
    groups = defaultdict(list)
    for name, p in trained_parameters(objective).items():
        scale = 1.0 if name.startswith("lm.") else config.train_text_encoder / config.lr
        is_matrix = p.ndim >= 2 and not name.endswith("biases")
        groups[scale, config.weight_decay if is_matrix else 0.0].append(p)
    groups = [dict(params=ps, scale=s, weight_decay=decay) for (s, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, config.lr, (0.9, config.beta2), fused=True)


def trained_parameters(objective):
    """{"lm." + name or "text." + name: parameter}, those that are trained"""
    named = {f"lm.{name}": p for name, p in objective.model.named_parameters()}
    named |= {f"text.{name}": p for name, p in objective.encoder.encoder.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


# ---------------------------------------------------------------------- validation and the log ----


@torch.no_grad()
def validate(model, objective, data, config):
    """Losses on held-out clips, drawn at random but always the same, in windows as long as
    training's longest: with the right captions, with those of other clips ("shuffled") and without
    ("empty"). If all have the same caption, there is no "shuffled".

    Of a language model: nats per token, and those of the first second of each window, where the
    text is all there is to go by ("right_1s"). Of a refiner: the squared error of v, and the same
    without codebook 1 ("right_blind").
    """
    objective.eval()
    model.eval()
    device = next(model.parameters()).device
    clips, length = data.valid, longest(config)
    # In the manifest's order, neighbours are often of one track.
    chosen = np.random.default_rng(17).permutation(len(clips))[: config.valid_clips]
    captions = [data.describe(clips.rows[i], np.random.default_rng([17, i])) for i in chosen]
    others = dict(right=captions, shuffled=captions[1:] + captions[:1], empty=[""] * len(chosen))
    if len({*captions}) == 1:
        del others["shuffled"]  # it would look as if words did not matter
    windows = []  # (number of the caption, clip, first frame); the rest of a clip is not read
    for number, i in enumerate(chosen):
        last = max(0, clips.rows[i]["frames"] - length)
        windows += [(number, i, start) for start in range(0, last + 1, length)]
    measure = refiner_losses if objective.codec else lm_losses
    losses = defaultdict(list)
    for kind, texts in others.items():
        for first in range(0, len(windows), config.batch):
            part = windows[first : first + config.batch]
            codes = np.stack([clips.codes(i, start, length) for _, i, start in part])
            codes = torch.from_numpy(codes).to(device)
            words = [texts[number] for number, *_ in part]
            with autocast(device):
                found = measure(model, objective, codes, words, seed=first)
            for suffix, some in found.items():
                losses[kind + suffix].append(some)
    objective.train()
    return {name: torch.cat(parts).mean().item() for name, parts in losses.items()}


def lm_losses(lm, objective, codes, captions, seed):
    """{suffix of the score: losses (n,)}"""
    losses = token_losses(lm, objective.encoder, codes, captions)
    real = codes != lm.config.codebook_size
    second = round(FRAME_RATE)
    return {"": losses[real], "_1s": losses[..., :second][real[..., :second]]}


def refiner_losses(refiner, objective, codes, captions, seed):
    losses = {}
    parts = refiner, objective.encoder, objective.codec, codes, captions
    for suffix, dropout in (("", 0.0), ("_blind", 1.0)):
        same_noise = torch.Generator().manual_seed(seed)  # for every kind of caption
        loss = refiner_loss(*parts, dropout, same_noise, objective.teacher)
        losses[suffix] = loss.expand(len(codes))
    return losses


class Log:
    """log.jsonl: one line per step, and one per validation; and what the terminal shows. Lines
    after the checkpoint that a run is resumed from are dropped."""

    def __init__(self, path, step, steps, writes):
        self.path, self.writes, self.rows = path, writes, []
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be cut
            try:
                self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]
                [float(value) for row in self.rows for value in row.values()]  # all are numbers
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is damaged: remove it to continue without it") from None
        if writes:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.bar = tqdm(initial=step, total=steps, unit="step", mininterval=1, disable=not writes)

    def write(self, **row):
        self.rows.append(row)
        if self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def step(self, step, **row):
        self.write(step=step, **row)
        speed = row["tokens"] / row["seconds"]
        self.bar.set_postfix_str(
            f"loss {self.recent_loss():.3f}, lr {row['lr']:.1e}, |g| {row['norm']:.2f}, "
            f"{speed:,.0f} tokens/s", refresh=False,
        )  # fmt: skip
        self.bar.update()

    def validation(self, step, scores):
        self.write(step=step, **scores)
        self.print("valid  " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))

    def recent_loss(self):
        return np.mean([row["loss"] for row in self.rows[-60:] if "loss" in row][-50:])

    def print(self, text):
        if self.writes:
            self.bar.write(text)


def introduce(objective, config, data, device):
    """The first lines of a run: which SSD runs, the cost, the data."""
    if objective.model.config.variant != "transformer":
        print(ssd_kernel.path(device))
    text = sum(p.numel() for p in objective.encoder.parameters())
    print(budget.describe_cost(objective.model.config, config, text))
    print(f"{len(data.train):,} clips to train on, {len(data.valid):,} to validate; on {device}")


# -------------------------------------------------------------------------- the command line ----


def parse_arguments(argv):
    """-> the model's config, the TrainConfig, the run's folder, and whether this is a dry run"""
    # The variant and the preset decide which other options there are, and their defaults.
    first = new_parser(add_help=False)
    add = first.add_argument
    add("--preset", default="toy", choices=PRESETS["lm"], help="sizes and schedule [toy]")
    add("--resume", metavar="RUN", help="continue the run in this folder")
    add("--init-from", default="")
    add("--dry-run", action="store_true", help="print what it would cost, and end")
    add("--variant", default="simba", choices=[*VARIANTS, "refiner"])
    known = first.parse_known_args(argv)[0]
    refining = known.variant == "refiner"
    kind, presets = LMConfig, PRESETS["lm"]
    if refining:
        kind, presets = RefinerConfig, PRESETS["refiner"]
    if known.preset not in presets:
        raise ValueError(f"a {known.variant} has no preset {known.preset!r}: {', '.join(presets)}")
    preset = presets[known.preset] | ({} if refining else dict(variant=known.variant))
    preset = presets.get(preset.get("init_from"), {}) | preset  # laptop is like toy
    if known.init_from:  # large steps and short crops would undo what the model has learned
        preset["lr"] = preset.get("lr", TrainConfig.lr) / 6
        preset["crop"] = max(preset.get("crop", TrainConfig.crop), 3.0)
    parser = new_parser(__doc__, parents=[first], conflict_handler="resolve")
    add_arguments(parser.add_argument_group("model"), kind, **preset)
    add_arguments(parser.add_argument_group("training"), TrainConfig, **preset)
    names = {k: [f.name for f in fields(k)] for k in (kind, TrainConfig)}
    given = Namespace(**dict.fromkeys([*vars(known), *names[kind], *names[TrainConfig]]))
    parser.parse_args(argv, given)  # what is not on the command line stays None
    named = {name: value for name, value in vars(given).items() if value is not None}
    if known.resume:
        return *resumed(Path(known.resume), named), known.dry_run
    chosen = preset | named
    model, config = (k(**{n: chosen[n] for n in names[k] if n in chosen}) for k in names)
    if config.distill and not refining:
        raise ValueError("--distill is for --variant refiner")
    if refining and config.recompute:
        raise ValueError("--recompute is for language models: a refiner is small without it")
    if config.init_from:  # its shape, which the command line may repeat
        if named.get("text_encoder"):
            raise ValueError("--init-from brings its own --text-encoder: leave that out")
        folder = initial(config, refining)
        model = checkpoint.read_model_config(folder, kind)
        for name, have in asdict(model).items():
            if (want := named.get(name, have)) != have:
                option = f"{flag(name)} {have}, not {want}"
                raise ValueError(f"{folder} has {option}: leave it out, or --init-from")
    name = model.variant + ("" if refining or model.codebooks == 1 else f"-{model.codebooks}")
    run = Path(config.out or f"out/{name}")
    if begun(run) and not known.dry_run:
        raise ValueError(f"{run} holds a run: use --resume {run}, or choose another --out")
    return model, config, run, known.dry_run


def resumed(run, named):
    """The configs of a run that is continued. named: the options on the command line."""
    if more := set(named) - {"resume", "dry_run"}:
        raise ValueError(f"--resume keeps the options of the run: leave out {flag(min(more))}")
    if not begun(run):
        raise ValueError(f"{run} holds no run to resume (no last/trainer.safetensors)")
    saved = checkpoint.read_config(run / "last")
    kind = RefinerConfig if is_refiner(saved) else LMConfig
    model = checkpoint.read_model_config(run / "last", kind)
    try:
        return model, TrainConfig(**saved["train"]), run
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run}/last/config.json is damaged: {error!r}") from None


if __name__ == "__main__":
    entry(main)
