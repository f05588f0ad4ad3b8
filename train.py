"""Trains a language model, or the refiner: one loop, read from top to bottom.

    python train.py --variant simba                      the toy world: a laptop, minutes, offline
    python train.py --variant simba --codebooks 9        ... a single stage, all codebooks at once
    python train.py --variant refiner                    ... the second stage of two
    python train.py --variant simba --preset paper --data data/jamendo
    python train.py --variant simba --preset paper --dry-run     what that would cost
    torchrun --nproc_per_node=4 train.py ...                     on four cards
    python train.py --resume out/simba                       goes on where it stopped

A run is a folder: last/ and best/ (checkpoints, see model.py), log.jsonl, loss.png, and a sample;
of --keep-every N, also step-N/, step-2N/, ... (N a multiple of --valid-every).
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ssd_kernel
from audio import FRAME_RATE, write_text
from checkpoint import (
    load_checkpoint,
    load_text_encoder,
    read_config,
    read_tensors,
    save_checkpoint,
)
from codec import load_codec
from data import Clips
from diffusion import Refiner, RefinerConfig, is_refiner, load_refiner, refiner_loss
from model import VARIANTS, LMConfig, MusicLM
from options import add_arguments, check, entry, option
from paper import budget
from sample import multiplies_bf16
from text import TextEncoder

ROOT = Path(__file__).parent


@dataclass
class TrainConfig:
    """How to train. The defaults are the paper's (SSMTTM, IV-A)."""

    data: str = option("toy", "data folder made by data.py, or toy: the one that ships")
    out: str = option("", "the run's folder; empty: out/VARIANT")
    init_from: str = option("", "fine-tune this checkpoint; toy: the one that ships")
    text_encoder: str = option("google/flan-t5-base", "a published T5; toy: the one that ships")
    train_text_encoder: float = option(0.0, "its own learning rate; 0: frozen", "[0, inf)")
    steps: int = option(100_000, "optimizer steps", "[1, inf)")
    seconds: float = option(30.0, "length of a training clip", "(0, inf)")
    batch: int = option(4, "clips in a micro-batch", "[1, inf)")
    accumulate: int = option(32, "micro-batches in a step", "[1, inf)")
    crop: float = option(30.0, "start with clips of this many seconds, then double", "(0, inf)")
    crop_until: float = option(0.0, "share of the steps until clips are whole", "[0, 1]")
    lr: float = option(1e-4, "learning rate after the warm-up; then a cosine to 0", "(0, 1]")
    warmup: int = option(100, "steps of linear warm-up", "[0, inf)")
    beta2: float = option(0.999, "AdamW's second beta", "[0, 1)")
    weight_decay: float = option(2e-2, "on matrices only", "[0, 1]")
    clip: float = option(1.0, "largest norm of the gradient", "(0, inf)")
    label_smoothing: float = option(0.0, "in training, not in validation", "[0, 1)")
    caption_dropout: float = option(0.1, "share of captions replaced by the empty one", "[0, 1]")
    ema: float = option(0.0, "decay of the averaged weights that are kept; 0: none", "[0, 1)")
    seed: int = option(0, "of weights, data order, captions and dropout", "[0, 4294967296)")
    valid_every: int = option(1000, "steps between validations (and checkpoints)", "[1, inf)")
    valid_clips: int = option(256, "clips of a validation", "[1, inf)")
    keep_every: int = option(0, "also keep every so many steps as step-N; 0: none", "[0, inf)")
    compile: bool = option(True, "torch.compile: faster after a minute or two")
    recompute: int = option(0, "blocks recomputed in the backward pass", "[0, inf)")
    fsdp: bool = option(False, "under torchrun: shard the weights")
    device: str = option("", "cpu, cuda or mps; empty: cuda where there is one, else cpu")

    def __post_init__(self):
        check(self)


PRESETS = {
    "paper": dict(recompute=6),
    "authors": dict(recompute=6, label_smoothing=0.1, warmup=500),  # as their code has it
    "large": dict(blocks=40, d_model=1536, attention_heads=12, recompute=30, fsdp=True),
    "toy": dict(
        text_encoder="toy", train_text_encoder=5e-4, blocks=4, d_model=128, d_state=32, headdim=32,
        chunk=32, init="memory", clock="beat", d_text=128, attention_heads=4, dropout=0.0,
        trained_frames=862, steps=1250, seconds=862 / FRAME_RATE, crop=32 / FRAME_RATE,
        crop_until=0.85, batch=5, accumulate=1, lr=3e-3, beta2=0.99, valid_every=125,
        valid_clips=64, compile=False,
    ),
}  # fmt: skip
REFINER_PRESETS = {
    "paper": dict(
        steps=200_000, seconds=10.0, crop=10.0, batch=16, accumulate=4, lr=2e-4,
        caption_dropout=0.2, ema=0.9999,
    ),
    "toy": dict(
        text_encoder="toy", layers=6, d_model=128, d_state=32, headdim=32, chunk=32, d_text=128,
        attention_heads=4, window=256, steps=1500, seconds=256 / FRAME_RATE, crop=256 / FRAME_RATE,
        batch=16, accumulate=1, lr=2e-3, beta2=0.99, caption_dropout=0.2, ema=0.995,
        valid_every=250, valid_clips=64, compile=False,
    ),
}  # fmt: skip


def main(argv=None):
    model_config, config, run, dry = parse_arguments(argv)
    refining = isinstance(model_config, RefinerConfig)
    device, rank, ranks = join_processes(config)
    if dry:
        toy_encoder = config.text_encoder == "toy"  # another need not be at hand
        text = size(new_encoder("toy")) if toy_encoder else budget.FLAN_T5_BASE
        return print_budget(model_config, config, text, device, dry=True)
    best = train(model_config, config, run, device, rank, ranks)
    if ranks > 1:
        wait_for(ranks)  # nobody hangs up while another still speaks
        dist.destroy_process_group()
    if rank > 0:
        return
    unit = "squared error of v" if refining else "nats per token"
    print(f"{run}: best validation loss {best:.3f} {unit}; curve in {run}/loss.png")
    import sample

    role = "--refiner" if refining else "--checkpoint"
    sample.main([*sample.SHOWCASE, role, str(run / "best"), "--out", str(run)])


def train(model_config, config, run, device, rank=0, ranks=1):
    """Trains, or goes on where `run` stopped, to the end -> the best validation loss."""
    refining = isinstance(model_config, RefinerConfig)
    torch.manual_seed(config.seed)
    resuming = begun(run)

    # Data and model. A clip of the toy world has no caption but the factors to draw one from.
    if rank > 0:
        wait_for(ranks)  # the first unpacks and downloads, for all
    folder, describe = open_data(config.data, refining)
    start = run / "last" if resuming else initial(config, refining)  # or none
    origin = read_config(start) if start else {}
    clips, valid = (
        Clips(folder, split, model_config.codebooks, origin.get("codec"))
        for split in ("train", "valid")
    )
    codec = load_codec(clips.meta["codec"]) if refining else None
    if start:
        load = load_refiner if refining else load_checkpoint
        lm, encoder = load(start), load_text_encoder(start)
    else:
        encoder = new_encoder(config.text_encoder)
        model_config.d_text = encoder.d_text
        lm = Refiner(model_config) if refining else MusicLM(model_config)
        if refining:
            lm.fit(codec)
    if not refining:
        lm.recompute = config.recompute
    if rank == 0:
        wait_for(ranks)
    encoder.requires_grad_(config.train_text_encoder > 0)
    if encoder.name != "small" and not encoder.trained and device.type == "cuda":
        encoder.bfloat16()  # a published one, which is not stored with the checkpoints
    lm.to(device).train()
    encoder.to(device).train(encoder.trained)
    if refining:
        codec.to(device)
    ema = AveragedModel(lm, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    kept = ema.module if ema else lm  # the weights that are validated and stored
    objective = spread(Objective(lm, encoder, codec, config), config, device, ranks)
    optimizer = make_optimizer(lm, encoder, config)
    log = Log(run / "log.jsonl", write=rank == 0)
    step, best = 0, math.inf
    if resuming:
        step, best = load_trainer(run / "last", lm, encoder, optimizer, ema)
    log.cut(step)
    if rank == 0:
        if lm.config.variant != "transformer":
            print(ssd_kernel.path(device))
        print_budget(lm.config, config, size(encoder), device)
        print(f"{len(clips):,} clips; on {device}")

    def save(name):
        extra = dict(train=asdict(config), step=step, best=best, codec=clips.meta["codec"])
        if "sampling" in origin:  # it plays with the options of what it started from
            extra["sampling"] = origin["sampling"]
        files = None
        if name == "last":
            files = {"trainer.safetensors": trainer_state(lm, encoder, optimizer, ema)}
        weights = {k: whole(v) for k, v in kept.state_dict().items()}
        if rank == 0:
            try:
                save_checkpoint(run / name, kept, encoder, extra, files, weights=weights)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{run / name} could not be written ({error}): the checkpoint before it is "
                    f"as it was; make room, then go on with --resume {run}"
                ) from None

    stop = []  # Ctrl-C and SIGTERM finish the step, then save
    told = lambda *_: stop.append(1)
    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}

    shares = ((n, share(n, config, rank, ranks)) for n in range(step, config.steps))
    window = stages(config)[-1][1]  # a crop begins where the whole clip would
    make = lambda n, first, count, frames: clips.batch(
        first, count, frames, config.seed, describe, config.caption_dropout, window
    )
    batches = prefetched(make, ((n, *part) for n, parts in shares for part in parts), device)
    started, first_step, bad, skipped, seen = time.time(), step, 0, 0, 0
    while step < config.steps:
        step_started = time.time()
        frames, batch = shape_at(step, config)
        total = batch * config.accumulate
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        # Chance is a function of seed, step and process, so that nothing of it needs to be kept.
        torch.manual_seed(
            int(np.random.SeedSequence((config.seed, step, rank)).generate_state(1)[0])
        )
        loss, parts = 0.0, share(step, config, rank, ranks)
        for i, (_, count, _) in enumerate(parts):
            codes, captions = next(batches)
            with together(objective, ranks, last=i == len(parts) - 1):
                part = objective(codes, captions) * (count * ranks / total)
                part.backward()
            loss += part.item()
            seen += codes[:, 0].numel() * ranks
        norm = torch.nn.utils.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], config.clip
        )
        norm = whole(norm).item()
        loss, stopping = agree(loss, stop, ranks, device)
        if math.isfinite(norm):
            optimizer.step()
            bad = 0
            if ema:
                ema.update_parameters(lm)
        else:
            bad, skipped = bad + 1, skipped + 1
            if rank == 0:
                print(f"step {step}: loss {loss}, gradient {norm}; step skipped, {skipped} so far")
            if bad == 10:
                raise ValueError(f"10 bad steps in a row; the last good checkpoint is {run}/last")
        optimizer.zero_grad(set_to_none=True)
        step += 1

        rate = seen / (time.time() - started)
        took = time.time() - step_started
        log.write(step=step, loss=loss, norm=norm, lr=lr, frames=frames, seconds=took)
        if rank == 0 and (step % 10 == 0 or step == config.steps):
            left = (time.time() - started) / (step - first_step) * (config.steps - step)
            print(
                f"\rstep {step:6}/{config.steps}  loss {log.smooth():.3f}  lr {lr:.1e}  "
                f"|g| {norm:5.2f}  {rate:7,.0f} tokens/s  {left / 60:5.1f} min left ",
                end="",
                flush=True,
            )
        if step % config.valid_every == 0 or step == config.steps or stopping:
            if not stopping:
                scores = validate(kept, encoder, codec, valid, describe, config, device)
                lm.train(), encoder.train(encoder.trained)
                log.write(step=step, **scores)
                if rank == 0:
                    print("\n  valid  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
                if scores["right"] < best:
                    best = scores["right"]
                    save("best")
            if config.keep_every and step % config.keep_every == 0:
                save(f"step-{step}")
            save("last")
            if stopping:
                if rank == 0:
                    print(f"\nstopped at step {step}; `python train.py --resume {run}` goes on")
                sys.exit(130)

    for number, handler in before.items():
        signal.signal(number, handler)
    if rank == 0:
        plot(log, run / "loss.png")
    return best


def parse_arguments(argv):
    # The variant and the preset decide what other options there are, and their defaults.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="toy", choices=PRESETS, help="sizes and schedule [toy]")
    first.add_argument("--resume", metavar="RUN", help="go on with this run's folder")
    first.add_argument("--init-from", default="")
    first.add_argument("--dry-run", action="store_true", help="say what it would cost, and end")
    kinds = ", ".join([*VARIANTS, "refiner"])
    first.add_argument("--variant", default="simba", help=f"what to train: {kinds} [simba]")
    known = first.parse_known_args(argv)[0]
    refining = known.variant == "refiner"
    kind, presets = (RefinerConfig, REFINER_PRESETS) if refining else (LMConfig, PRESETS)
    if known.preset not in presets:
        raise ValueError(f"a {known.variant} has no preset {known.preset!r}: {', '.join(presets)}")
    preset = presets[known.preset] | ({} if refining else dict(variant=known.variant))
    if known.init_from:  # what it knows already would be shaken off by large steps and short crops
        preset["lr"] = preset.get("lr", TrainConfig.lr) / 6
        preset["crop"] = max(preset.get("crop", TrainConfig.crop), 3.0)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[first],
        conflict_handler="resolve",  # LMConfig has a variant as well
    )
    add_arguments(parser.add_argument_group("model"), kind, **preset)
    add_arguments(parser.add_argument_group("training"), TrainConfig, **preset)
    args = parser.parse_args(argv)
    pick = lambda kind: kind(**{f.name: getattr(args, f.name) for f in fields(kind)})
    if args.resume:
        if more := named_options(argv) - {"--resume", "--dry-run"}:
            raise ValueError(f"--resume goes on with the run's own options: leave out {min(more)}")
        saved = read_config(Path(args.resume) / "last")
        kind = RefinerConfig if is_refiner(saved) else LMConfig
        config = TrainConfig(**saved["train"])
        return kind(**saved["model"]), config, Path(args.resume), args.dry_run
    model, config = pick(kind), pick(TrainConfig)
    if refining and config.recompute:
        raise ValueError("--recompute goes with language models: a refiner is small without it")
    if config.valid_every < 1:
        raise ValueError(f"--valid-every must be at least 1, not {config.valid_every}")
    if config.keep_every % config.valid_every:
        raise ValueError(f"--keep-every must be a multiple of --valid-every, {config.valid_every}")
    if config.fsdp and (config.ema or config.train_text_encoder):
        raise ValueError("--fsdp goes with a frozen text encoder and without --ema")
    if config.init_from:
        model = shape_of(initial(config, refining), model, argv)
    name = model.variant + ("" if refining or model.codebooks == 1 else f"-{model.codebooks}")
    run = Path(config.out or f"out/{name}")
    if begun(run) and not args.dry_run:
        raise ValueError(f"{run} holds a run: go on with --resume {run}, or choose another --out")
    return model, config, run, args.dry_run


def named_options(argv):
    """The options that a command line names: {"--steps", ...}; argv None: this process's."""
    words = sys.argv[1:] if argv is None else argv
    return {word.split("=")[0] for word in words if word.startswith("--")}


def begun(run):
    """Whether there is a checkpoint to go on from, if only the one before the last."""
    return (run / "last").exists() or (run / "last.old").exists()


def initial(config, refining):
    """The checkpoint that a run starts from, if any."""
    shipped = ROOT / "toy" / ("refiner" if refining else "lm")
    return shipped if config.init_from == "toy" else config.init_from


def shape_of(folder, asked, argv):
    """The model's shape is the checkpoint's. ValueError if the command line asks for another."""
    load = load_refiner if isinstance(asked, RefinerConfig) else load_checkpoint
    saved = load(folder).config
    words = named_options(argv)
    for field in fields(saved):
        option = "--" + field.name.replace("_", "-")
        have, want = getattr(saved, field.name), getattr(asked, field.name)
        if option in words and have != want:
            raise ValueError(
                f"{folder} has {option} {have}, not {want}: leave out {option}, or --init-from"
            )
    return saved


def open_data(name, refining=False):
    """-> the data folder, and describe(row, rng) -> caption."""
    from toy import corpus, words

    folder = corpus.folder() if name == "toy" else Path(name)
    # The sketch has the genre in it already. What a refiner needs the words for is the lead.
    draw = words.caption_with_lead if refining else words.caption

    def describe(row, rng):
        return draw(row["factors"], rng) if "factors" in row else row["caption"]

    return folder, describe


def new_encoder(name):
    from toy import corpus

    return corpus.text_encoder() if name == "toy" else TextEncoder.pretrained(name)


# ------------------------------------------------------------------------- several processes ----
#
# Under torchrun every process has a rank and, where there are GPUs, one of its own. The clips of a
# step are dealt out among them, and their gradients averaged, so the same steps are made as by one.


def join_processes(config):
    """-> this process's device, its rank, and the number of ranks."""
    rank, ranks = (int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(config.device or ("cuda" if cuda else "cpu"))
        if ranks > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or none here
        raise ValueError(f"--device {config.device}: {str(error).splitlines()[0]}") from None
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    elif config.fsdp:
        config.fsdp = False  # one process keeps all
    return device, rank, ranks


def wait_for(ranks):
    if ranks > 1:
        dist.barrier()


class Objective(nn.Module):
    """codes (B, K, L) and their captions -> the loss; one module with all that is trained."""

    def __init__(self, lm, encoder, codec, config):
        super().__init__()
        self.lm, self.encoder = lm, encoder
        self.codec, self.smoothing = codec, config.label_smoothing
        self.run = torch.compile(lm, dynamic=False) if config.compile else lm

    def forward(self, codes, captions):
        if self.codec:
            with autocast(codes.device):
                return refiner_loss(self.run, self.encoder, self.codec, codes, captions)
        smoothing = dict(label_smoothing=self.smoothing)
        return caption_loss(self.run, self.encoder, codes, captions, **smoothing)


def spread(objective, config, device, ranks):
    """The objective, made to average its gradients over the ranks."""
    if config.fsdp:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(device.type, (ranks,))
        for block in objective.lm.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(objective.lm, mesh=mesh)
    elif ranks > 1:
        return nn.parallel.DistributedDataParallel(objective)
    return objective


def together(objective, ranks, last):
    """Gradients are averaged in a step's last backward pass only."""
    if isinstance(objective, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else objective.no_sync()
    if ranks > 1:
        objective.lm.set_requires_gradient_sync(last)
    return nullcontext()


def agree(loss, stop, ranks, device):
    """-> the ranks' mean loss, and whether any was told to stop."""
    if ranks == 1:
        return loss, bool(stop)
    told = torch.tensor([loss / ranks, float(bool(stop))], device=device)
    dist.all_reduce(told)
    return told[0].item(), told[1].item() > 0


def whole(v):
    """A tensor that ranks share, in one piece; any other as it is."""
    return v.full_tensor() if isinstance(v, DTensor) else v


def share(step, config, rank, ranks):
    """A rank's part of a step -> [(number of its first sample, samples, frames)], micro-batches."""
    frames, batch = shape_at(step, config)
    first, total = seen_before(step, config)[0], batch * config.accumulate
    if total < ranks:
        raise ValueError(f"{ranks} processes are too many for {total} clips a step")
    begin, end = (total * r // ranks for r in (rank, rank + 1))
    return [(first + i, min(batch, end - i), frames) for i in range(begin, end, batch)]


def prefetched(make, jobs, device, ahead=2):
    """make(*job) for each job, on the device, made in a thread while the device is at work."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(make, *job) for job in itertools.islice(jobs, ahead))
        while waiting:
            codes, captions = waiting.popleft().result()
            waiting.extend(pool.submit(make, *job) for job in itertools.islice(jobs, 1))
            codes = codes.pin_memory() if device.type == "cuda" else codes
            yield codes.to(device, non_blocking=True), captions


# ------------------------------------------------------------------------------------- the loss --


def caption_loss(lm, encoder, codes, captions, reduction="mean", label_smoothing=0.0):
    """Cross-entropy in nats per token of codes (B, K, L) given their captions."""
    with autocast(codes.device):
        with nullcontext() if encoder.trained else torch.no_grad():
            compiled = not isinstance(lm, MusicLM)  # ... and should meet few shapes
            text = encoder(captions, multiple=64 if compiled else 1)
        logits = lm(codes, *text)  # (B, K, L, V)
    return F.cross_entropy(
        logits.float().flatten(0, 2),
        codes.flatten(),
        ignore_index=lm.config.codebook_size,  # padding
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def autocast(device):
    """bf16 matrix products over fp32 parameters, where the hardware has them: pure bf16 weights
    diverge (the steps of a slow learning rate are smaller than their last digit)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


def stages(config):
    """-> [(the step at which it ends, frames of a clip, clips of a micro-batch)].

    Training begins with short crops, many to a batch, and their length doubles in equal stages
    until clips are whole. What the words mean shows in how the music begins, so a model learns it
    from many beginnings; local texture comes quickly as well; whole clips teach the long run. All
    crops are beginnings, so that what the positions tell of the time is true.
    """
    whole, crop = (max(1, round(s * FRAME_RATE)) for s in (config.seconds, config.crop))
    doublings = max(0, round(math.log2(whole / crop)))
    ends = [round(config.steps * config.crop_until * (i + 1) / doublings) for i in range(doublings)]
    lengths = [crop << i for i in range(doublings)]
    text = budget.TEXT  # of as many tokens, however short the clip
    clips = [config.batch * (whole + text) // (frames + text) for frames in lengths]
    return [*zip(ends, lengths, clips), (config.steps, whole, config.batch)]


def shape_at(step, config):
    """-> frames of a clip and clips of a micro-batch."""
    return next((frames, clips) for end, frames, clips in stages(config) if step < end)


def seen_before(step, config):
    """The samples and the tokens (of one codebook) that came before this step; a sample's number
    decides its clip, its crop and its caption, and every clip is seen once before any is again."""
    samples = tokens = begin = 0
    for end, frames, clips in stages(config):
        steps = max(0, min(step, end) - begin)
        samples += config.accumulate * steps * clips
        tokens += config.accumulate * steps * clips * frames
        begin = max(begin, end)
    return samples, tokens


def learning_rate(step, config):
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(lm, encoder, config):
    """AdamW; weight decay for matrices only: not for biases, norms, A_log, D and dt_bias."""
    groups = []
    for part, scale in (("lm.", 1.0), ("text.", config.train_text_encoder / config.lr)):
        named = {k: p for k, p in named_parameters(lm, encoder).items() if k.startswith(part)}
        decayed = [p for k, p in named.items() if p.ndim >= 2 and not k.endswith("biases")]
        rest = [p for k, p in named.items() if p.ndim < 2 or k.endswith("biases")]
        if named:
            groups += [
                dict(params=decayed, scale=scale, weight_decay=config.weight_decay),
                dict(params=rest, scale=scale),
            ]
    return torch.optim.AdamW(groups, config.lr, (0.9, config.beta2), weight_decay=0.0, fused=True)


def size(module):
    return sum(p.numel() for p in module.parameters())


def named_parameters(lm, encoder):
    named = {f"lm.{name}": p for name, p in lm.named_parameters()}
    named |= {f"text.{name}": p for name, p in encoder.encoder.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


@torch.no_grad()
def validate(model, encoder, codec, clips, describe, config, device):
    """Losses over whole clips with the right captions, with another clip's, with none; and under a
    second name where the text is all there is to go by. Of a language model, nats per token, and
    those of the clips' first second ("1s"); of the refiner, over windows as it refines them, the
    squared error of v, and the same without the sketch ("blind")."""
    model.eval(), encoder.eval()
    count, second = min(config.valid_clips, len(clips)), round(FRAME_RATE)
    rows = range(count)
    frames = max(clips.rows[i]["frames"] for i in rows)
    captions = [describe(clips.rows[i], np.random.default_rng([17, i])) for i in rows]
    others = {"right": captions, "shuffled": captions[1:] + captions[:1], "empty": [""] * count}
    scores = {}
    for kind, texts in others.items():
        whole, little = [], []  # (sum of losses, their number)
        for i in range(0, count, 8):
            part = range(i, min(i + 8, count))
            codes = torch.from_numpy(np.stack([clips.codes(j, 0, frames) for j in part])).to(device)
            said = [texts[j] for j in part]
            if codec:
                codes, said = windows(codes, said, model.config.window)
                for sums, dropout in ((whole, 0.0), (little, 1.0)):
                    same = torch.Generator().manual_seed(i)  # noise and times, for every caption
                    with autocast(device):
                        loss = refiner_loss(model, encoder, codec, codes, said, dropout, same)
                    sums.append((loss.item() * len(part), len(part)))
                continue
            losses = caption_loss(model, encoder, codes, said, reduction="none").view_as(codes)
            real = codes != model.config.codebook_size
            whole.append((losses.sum().item(), real.sum().item()))
            little.append((losses[..., :second].sum().item(), real[..., :second].sum().item()))
        for name, sums in ((kind, whole), (kind + ("_blind" if codec else "_1s"), little)):
            scores[name] = sum(a for a, _ in sums) / sum(b for _, b in sums)
    return scores


def windows(codes, captions, window):
    """Clips (B, K, L) -> their whole windows (n B, K, window), and the captions of those. A refiner
    with attention errs on more frames at once than it was trained on, and never meets them."""
    n = max(codes.shape[2] // window, 1)
    parts = codes[:, :, : n * window].chunk(n, 2)
    return torch.cat(parts), captions * n


def trainer_state(lm, encoder, optimizer, ema):
    """What resuming needs besides the stored weights: the optimiser's moments and, where the stored
    weights are averages, those that are trained."""
    state = {}
    for name, p in named_parameters(lm, encoder).items():
        if p in optimizer.state:  # not before the first good step
            state |= {f"{k}.{name}": whole(v.detach()).cpu() for k, v in optimizer.state[p].items()}
        if ema:
            state[f"trained.{name}"] = p.detach().cpu()
    return state


@torch.no_grad()
def load_trainer(folder, lm, encoder, optimizer, ema):
    state, config = read_tensors(folder / "trainer.safetensors"), read_config(folder)
    for name, p in named_parameters(lm, encoder).items():
        for k in ("step", "exp_avg", "exp_avg_sq") if f"step.{name}" in state else ():
            v = state[f"{k}.{name}"].to("cpu" if k == "step" else p.device)
            if k != "step" and isinstance(p, DTensor):
                v = distribute_tensor(v, p.device_mesh, p.placements)
            optimizer.state[p][k] = v
        if ema:
            p.copy_(state[f"trained.{name}"])
    if ema:
        ema.n_averaged.fill_(config["step"])  # or the next update would begin a new average
    return config["step"], config["best"]


class Log:
    """log.jsonl: a line a step, and one a validation."""

    def __init__(self, path, write=True):
        self.path, self.writes = path, write
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be cut
        self.rows = [json.loads(line) for line in lines]

    def cut(self, step):
        """Forgets what came after the checkpoint, if any, that the run goes on from."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if not self.writes:
            return
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, **row):
        self.rows.append(row)
        if not self.writes:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def smooth(self, n=50):
        losses = [row["loss"] for row in self.rows[-2 * n :] if "loss" in row][-n:]
        return sum(losses) / len(losses)


def print_budget(model_config, config, text, device, dry=False):
    """What the run will cost, `text` being the text encoder's parameters; with `dry`, when nothing
    else is told, the memory of a GPU that is not there as well, and the hours."""
    count, tokens = budget.parameters(model_config), seen_before(config.steps, config)[1]
    print(budget.describe_cost(model_config, config, count, tokens, text))
    if dry or device.type == "cuda":
        frames, batch = stages(config)[-1][1:]
        parts = budget.memory(model_config, config, count, text, frames, batch)
        print(budget.describe_memory(parts, device))
    if dry:
        print(budget.describe_hours(count, tokens, device))


def plot(log, path):
    """The loss curve: training, and validation with right, shuffled and no captions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [(row["step"], row["loss"]) for row in log.rows if "loss" in row]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharex=True)
    x, y = np.array(steps).T
    n = min(50, len(y))
    axes[0].plot(x[n - 1 :], np.convolve(y, np.ones(n) / n, "valid"), "0.6", lw=1, label="training")
    refining = any("right_blind" in row for row in log.rows)
    panels = {"": "whole clips"} | (
        {"_blind": "without the sketch"} if refining else {"_1s": "a clip's first second"}
    )
    for axis, (suffix, title) in zip(axes, panels.items()):
        for kind, color in (("right", "C0"), ("shuffled", "C1"), ("empty", "C2")):
            points = [(r["step"], r[kind + suffix]) for r in log.rows if kind + suffix in r]
            axis.plot(*zip(*points), "o-", color=color, ms=3, label=f"validation, {kind} captions")
        unit = "squared error of v" if refining else "nats per token"
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend()
    worst = max(r[kind] for r in log.rows for kind in ("right", "shuffled", "empty") if kind in r)
    axes[0].set_ylim(top=1.1 * worst)  # the first steps' losses would flatten all the others
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    entry(main)
