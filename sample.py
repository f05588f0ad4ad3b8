"""Plays a trained model: words in, music out.

    python sample.py "jazz reggae"                       jazz-reggae.wav and jazz-reggae.png
    python sample.py "slow piano waltz" "sad blues" --seconds 30 --n 4 --out waltz/
    python sample.py --file prompts.txt --out evening/   one prompt per line
    python sample.py "techno" --continue loop.wav        continues the music of a file
    python sample.py "ambient" --seconds 600 --stream | aplay -f S16_LE -r 44100

Music of any length is made in constant memory and written while it is made. The same command gives
the same bytes on the same machine. The defaults in brackets are those of the checkpoint that plays.

The file has three parts: sampling (`generate`, one token at a time), what plays, and the command.
"""

import collections
import copy
import functools
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ssd_kernel
from audio import FORMATS, FRAME_RATE, ensure_writable, read_audio, write_stream
from checkpoint import load_checkpoint, load_text_encoder, read_config
from codec import decode_stream, load_codec
from diffusion import is_refiner, load_refiner, refine
from model import Mamba2, mamba_step
from options import add_arguments, check, check_value, entry, new_parser, option, read_lines

ROOT = Path(__file__).parent
SHIPPED = ROOT / "toy" / "lm"
SHIPPED_REFINER = ROOT / "toy" / "refiner"
SHOWCASE = ["jazz reggae", "a slow calm piano waltz"]

# ------------------------------------------------------------------------------------------------
# 1  Sampling


@dataclass
class Sampling:
    """How tokens are drawn. The defaults are the paper's; a checkpoint may store its own."""

    guidance: float = option(3.0, "how strictly to follow the text; 1: not amplified", "[0, 100]")
    temperature: float = option(1.2, "above 1 more varied, below 1 safer", "[0.01, 100]")
    top_k: int = option(250, "choose among the K likeliest tokens", "[1, 1e9]")
    top_p: float = option(1.0, "and of those the fewest that reach this share", "(0, 1]")

    def __post_init__(self):
        check(self)


def played(lm):
    """Frames after which a model reads its text again: 96% of its trained length, since training
    clips fade out at their end."""
    return lm.config.trained_frames - round(0.04 * lm.config.trained_frames)


def remembered(lm):
    """Frames of its own music that a model hears when it reads again."""
    return round(0.3 * lm.config.trained_frames)


def guided(logits, guidance):
    """Classifier-free guidance (SSMTTM IV-A). logits (2 B, ...), the first half with the prompt,
    the second with the negative or empty one -> (B, ...)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def sample_tokens(logits, uniform, temperature=1.2, top_k=250, top_p=1.0):
    """Draws one token per row, by inverting the cumulative distribution.

    logits (..., V), uniform (...) in [0, 1) -> tokens (...). In this order: the special token (the
    last of V) is excluded, logits are divided by the temperature, the top_k largest are kept and
    normalised, and of those the fewest whose probabilities sum to top_p.
    """
    logits = logits[..., :-1].float() / temperature
    logits, tokens = logits.topk(min(top_k, logits.shape[-1]))  # sorted, likeliest first
    p = logits.softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)
    cumulative = p.cumsum(-1)
    choice = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice.clamp(max=tokens.shape[-1] - 1)).squeeze(-1)


@torch.inference_mode()
def generate(
    lm, encoder, prompts, frames, seeds, *, negative="", guidance=3.0, temperature=1.2, top_k=250,
    top_p=1.0, codes=None, before=None, kept=None, block=64,
) -> Iterator[Tensor]:  # fmt: skip
    """Samples `frames` frames for each of R prompts; yields blocks (R, K, up to `block`).

    seeds: R integers; negative: the prompt of the unconditional half of guidance; codes (R,K,T):
    music to continue, which is not yielded again; before: its length in frames, if `codes` is only
    the end of it. ValueError if the model's output is not finite.

    Beyond the length of its training clips a model leaves its text. Just before that, it reads the
    text again, and `kept` frames of the music [`remembered`; 0: it never does], the last ones or
    those of the opening (`faithful`). Then memory does not grow with `frames`.
    """
    K = len(lm.heads)
    device = lm.heads[0].weight.device
    if codes is None:
        codes = torch.empty(len(prompts), K, 0, dtype=torch.long)
    codes = codes.to(device)
    T = codes.shape[2]
    before = T if before is None else before
    halves = 1 if guidance == 1 else 2  # with the prompt, and without
    captions = [*prompts, *[negative] * len(prompts)][: halves * len(prompts)]
    trained = lm.config.trained_frames
    kept = remembered(lm) if kept is None else kept
    end = played(lm)
    steps = frames + K - 1
    # The next K - 1 columns are known in part: fine codes of the music so far, one frame behind
    # each other in the delay pattern.
    columns, known = lm.delay(codes)[:, :, 1:].split([T, K - 1], 2)
    columns = collections.deque(columns.unbind(2), maxlen=max(trained, T) + K)  # (R, K) each
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    done = []  # frames (R, K) that have all their codebooks
    reading = 0  # the step of the next reading
    opening = None  # the music before the first one
    with precision(lm):
        text = encoder(captions)
    for s in range(steps):
        if s == reading:
            recent = [*columns]
            if kept and len(recent) >= end:
                recent = recent[-kept:]
            left = steps - s
            if kept and left > trained - len(recent):
                left = max(end - len(recent), 1)
            reading = s + left
            codes = undelay(torch.stack(recent, 2)) if recent else codes
            past = before + s - len(recent)
            if kept and s and halves == 2:
                if opening is None:
                    opening, began = undelay(torch.stack([*columns][-end:], 2)), before + s - end
                codes = faithful(lm, text, codes, opening, past, began)
            with precision(lm):
                logits, state = lm.prefill(*text, torch.cat([codes] * halves), left, past)
            step = None
        if s % block == 0:
            uniform = torch.stack([torch.rand(block, K, generator=g) for g in generators])
            uniform = uniform.to(device)  # (R, block, K)
        if halves == 2:
            logits = guided(logits, guidance)  # (R, K, V)
        column = sample_tokens(logits, uniform[:, s % block], temperature, top_k, top_p)
        if s < K - 1:
            column[:, s + 1 :] = known[:, s + 1 :, s]
        columns.append(column)
        if s >= K - 1:
            done.append(torch.stack([columns[k - K][:, k] for k in range(K)], 1))
        if len(done) == block or s == steps - 1:
            if not logits.isfinite().all():
                raise ValueError("the model's predictions are not finite: its training diverged")
            yield torch.stack(done, 2).cpu()
            done = []
        if s + 1 < reading:
            column = torch.cat([column] * halves)
            with precision(lm):
                step = step or step_function(lm, column, state)
                logits = step(column)


@torch.inference_mode()
def faithful(lm, text, recent, opening, past, began):
    """What each row hears when the text is read again: its last frames, `recent` (R, K, T), or, if
    those have drifted from the text, frames of its `opening` (R, K, L), from the same place in a
    bar. Drifted: the `text_gain` is below 0.8 of that of the opening. past, began: frames of the
    piece before `recent`, and before `opening`.
    """
    R, K, T = recent.shape
    bpm = text[2][:R]
    start = torch.where(bpm > 0, (past - began) % (4 * 60 * FRAME_RATE / bpm), 0).long()
    start = start.clamp(max=opening.shape[2] - T)
    frames = start[:, None, None] + torch.arange(T, device=start.device)
    opening = opening.gather(2, frames.expand(R, K, T))
    fits = text_gain(lm, text, recent, past) >= 0.8 * text_gain(lm, text, opening, past)
    opening[..., -8:] = recent[..., -8:]  # the last 0.1 s, so that no seam is heard
    return torch.where(fits[:, None, None], recent, opening)


def text_gain(lm, text, codes, past):
    """How much better codebook 1 of codes (R, K, T) is predicted with the prompt than without it:
    nats a frame, (R,). text: of both halves of guidance."""
    columns = torch.cat([lm.delay(codes)] * 2)[:, :, : codes.shape[2]]
    with precision(lm):
        logits = lm.heads[0](lm.read(columns, *text, past=past)[0])  # (2 R, T, V)
    target = torch.cat([codes] * 2)[:, 0]
    losses = F.cross_entropy(logits.float().mT, target, reduction="none").mean(1)
    conditional, unconditional = losses.chunk(2)
    return unconditional - conditional


def undelay(columns):
    """Columns (B, K, L) in the delay pattern -> codes (B, K, L). In the last K - 1 frames some
    codes belong to later columns and are arbitrary; `lm.delay` puts them behind column L again."""
    return torch.stack([column.roll(-k, -1) for k, column in enumerate(columns.unbind(1))], 1)


def step_function(lm, column, state):
    """`lm.step` with this state, as a function of the column (B, K). On a GPU it is recorded as a
    CUDA graph and replayed: one launch instead of a few hundred."""
    if column.device.type != "cuda":
        return lambda column: lm.step(column, state)
    column = column.clone()  # a graph reads and writes the same memory at every replay
    layers = [layer for block in state.blocks for layer in block if layer is not None]
    tensors = [state.position, *itertools.chain(*layers)]
    before = [v.clone() for v in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        lm.step(column, state)  # compiles kernels and loads libraries, outside the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = lm.step(column, state)
    for v, old in zip(tensors, before):
        v.copy_(old)

    def replay(new):
        column.copy_(new)
        graph.replay()
        return logits

    return replay


LARGE = 50_000_000  # parameters from which a step is bound by reading the weights


def prepare(lm, device):
    """The model on its device, as it samples fastest. A step reads every weight once, so the
    matrices of a large model become bf16 where the hardware multiplies it. Vectors, convolutions
    and states stay fp32. Where a compiler is at hand the middle of Mamba-2 is compiled (seconds,
    once), so that a step passes over the states once and not four times."""
    device = torch.device(device)
    if sum(p.numel() for p in lm.parameters()) < LARGE:
        # Its operations are too small to share: threads would wait for each other. And so the bytes
        # do not depend on the number of cores.
        torch.set_num_threads(1)
    else:
        on_cpu = device.type == "cpu" and (shutil.which("g++") or shutil.which("clang++"))
        compiles = on_cpu or ssd_kernel.obstacle(device) is None  # where there is Triton
        for layer in lm.modules():
            if isinstance(layer, Mamba2) and compiles:
                layer.step_function = torch.compile(mamba_step, dynamic=False)
            if isinstance(layer, nn.Linear) and multiplies_bf16(device):
                layer.weight.data = layer.weight.data.bfloat16()
    return lm.to(device)


def multiplies_bf16(device):
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda"


def precision(lm):
    """The autocast that a `prepare`d model runs under: bf16 if its matrices are."""
    weight = lm.heads[0].weight
    bf16 = weight.dtype == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


# ------------------------------------------------------------------------------------------------
# 2  What plays


class System:
    """A language model with its codec and, if there is one for its codes, a refiner: ready to play.

    folder: the language model's checkpoint; refiner: that of a refiner, "" for the newest of the
    user's or the one that ships (see `find_refiner`), None for none.

    lm, encoder, codec: of the language model; sampling: its `Sampling` as a dict; second: the
    refiner's folder, or None; refining: options of `diffusion.refine`.
    """

    def __init__(self, folder, refiner=""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sampling = stored_sampling(folder)
        self.lm = prepare(load_checkpoint(folder), device)
        self.encoder = load_text_encoder(folder).to(device)
        self.codec = load_codec(read_config(folder).get("codec"))
        self.second = None if refiner is None else find_refiner(self.lm, self.codec, refiner)
        if self.second:
            self.refiner = load_refiner(self.second).to(device)
            self.refiner_encoder = load_text_encoder(self.second).to(device)
            # The refiner needs the codec's entries on its device; decoding stays on the CPU.
            self.refiner_codec = copy.deepcopy(self.codec).to(device)
            self.refining = read_config(self.second).get("sampling", {})

    def refine(self, prompt, pieces, seed, heard=None):
        """First-codebook codes, (1, l) at a time -> those of all codebooks (`diffusion.refine`)."""
        parts = self.refiner, self.refiner_encoder, self.refiner_codec
        return refine(*parts, prompt, pieces, seed, heard=heard, **self.refining)

    def audio(self, prompt, seed, pieces, heard):
        """Codes (K, l) at a time -> audio (samples,), 1.5 s at a time. heard (9, T): codes of the
        music that is continued, which is played first."""
        last_stage = self.refiner if self.second else self.lm
        heard = heard[: last_stage.config.codebooks]
        if self.second:
            pieces = ahead(self.refine(prompt, ahead(pieces), seed, heard))
        return decode_stream(self.codec, itertools.chain([heard], pieces))


def ahead(items, depth=4):
    """Yields the items of an iterable, which runs in a thread of its own up to `depth` items ahead:
    the language model, the refiner and the codec work at the same time."""
    items = iter(items)
    pool = ThreadPoolExecutor(1)
    try:
        futures = collections.deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := futures.popleft().result()) is not None:
            futures.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def stored_sampling(folder) -> dict:
    """The `Sampling` that a checkpoint was shipped with, else the paper's."""
    config = read_config(folder)
    if is_refiner(config):
        raise ValueError(f"{folder} holds a refiner: it goes with --refiner")
    try:
        return asdict(Sampling(**config.get("sampling", {})))
    except TypeError:
        raise ValueError(f'{folder}/config.json: "sampling" holds unknown options') from None


def newest_checkpoint(refiner=False, codec=None):
    """best/ of the user's newest run (of a refiner, or of a language model), else what ships.
    codec: only models of this codec, and of language models those that write codebook 1 alone."""
    runs = []
    for file in Path("out").glob("*/best/config.json"):
        try:
            config = read_config(file.parent)
        except ValueError:  # of another program, or broken
            continue
        alone = refiner or config["model"].get("codebooks") == 1
        fits = codec is None or (config.get("codec") == codec and alone)
        if is_refiner(config) == refiner and "train" in config and fits:
            runs.append(file.parent)
    shipped = SHIPPED_REFINER if refiner else SHIPPED
    return max(runs, key=lambda folder: folder.stat().st_mtime, default=shipped)


def find_refiner(lm, codec, folder=""):
    """The folder of a refiner for this language model: `folder`, else the newest of the user's,
    else the one that ships; None if the model needs none, or none fits its codec."""
    if lm.config.codebooks > 1:
        if folder:
            raise ValueError("the language model makes all codebooks itself: leave out --refiner")
        return None
    found = folder or newest_checkpoint(True, codec.name)
    name = read_config(found).get("codec")
    if folder and name != codec.name:
        raise ValueError(f"{folder} refines codes of {name}, the model's are of {codec.name}")
    return Path(found) if name == codec.name else None


# ------------------------------------------------------------------------------------------------
# 3  The command


def main(argv=None):
    from live.follow import follow, play, read_wishes  # it imports this file
    from paper.figures import Picture

    args = parse_arguments(argv)
    prompts = read_prompts(args)
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n)]
    live = args.stream or args.play
    if live and (len(jobs) > 1 or args.out):
        raise ValueError("--stream and --play take one prompt, without --n and --out")
    if args.follow and (not live or args.continue_file or not sys.stdin):
        raise ValueError("--follow reads standard input, with --play or --stream, not --continue")
    paths = [] if live else output_paths(args, jobs)
    system = System(args.checkpoint, None if args.no_refiner else args.refiner)
    say = functools.partial(print, file=sys.stderr if args.stream else sys.stdout, flush=True)
    introduce(system, args, say)
    for text in [*prompts, args.negative]:
        if system.encoder.is_too_long(text):
            say(f"warning: a prompt is cut to {system.encoder.max_tokens} tokens: {text[:60]}...")
    if args.steps is not None:
        if not system.second:
            raise ValueError("--steps is for a refiner, and none plays: leave it out")
        check_value("steps", args.steps, f"[1, {system.refiner.config.timesteps}]")
        system.refining |= dict(steps=args.steps)

    started = time.time()
    codec, lm = system.codec, system.lm
    if args.follow:
        latest = read_wishes(prompts[0])
        audio = follow(system, lambda: (latest[0], args.seed, args.sampling))
        return play(audio, codec.sample_rate, args.stream)
    frames = max(1, round(args.seconds * codec.sample_rate / codec.hop))
    heard = torch.empty(codec.codebooks, 0, dtype=torch.long)
    if args.continue_file:
        heard = codec.encode(read_audio(args.continue_file))[0]  # (9, T)
    known = heard[: lm.config.codebooks, -lm.config.trained_frames :].expand(len(jobs), -1, -1)
    blocks = generate(
        lm, system.encoder, [prompt for prompt, _ in jobs], frames,
        [seed for _, seed in jobs], codes=known, before=heard.shape[1], **args.sampling,
    )  # fmt: skip
    blocks = tqdm(blocks, total=-(-frames // 64), unit="block", disable=None, leave=False)
    if len(jobs) == 1:  # it is decoded while it is made
        made = [(block[0] for block in blocks)]
    else:
        made = [[codes] for codes in torch.cat([*blocks], 2)]
    if live:
        return play(system.audio(*jobs[0], made[0], heard), codec.sample_rate, args.stream)
    samples = (heard.shape[1] + frames) * codec.hop
    for path, (prompt, seed), pieces in zip(paths, jobs, made):
        picture = Picture(samples)
        audio = system.audio(prompt, seed, pieces, heard)
        write_stream(path, picture.watch(audio), samples)
        picture.save(path.with_suffix(".png"), f"{prompt} (seed {seed})", codec.sample_rate)
        say(f"{path} and {path.with_suffix('.png')}")
    seconds = len(jobs) * samples / codec.sample_rate
    say(f"{seconds:.1f} s of audio in {time.time() - started:.1f} s")


def introduce(system, args, say):
    """Prints what plays, and warns where a refiner is missing."""
    config = system.lm.config
    line = f"{os.path.relpath(args.checkpoint)}: {config.variant}, {config.blocks} blocks, "
    line += f"{config.codebooks} codebook(s)"
    say(line + (f"; refiner {os.path.relpath(system.second)}" if system.second else ""))
    if config.variant != "transformer":
        say(ssd_kernel.path(system.lm.heads[0].weight.device))
    if config.codebooks == 1 and not system.second and not args.no_refiner:
        say(
            f"warning: no refiner for the codec {system.codec.name}: you will hear codebook 1 of "
            f"{system.codec.codebooks} alone; train one with `python train.py --variant refiner`"
        )


def add_models(parser):
    """The options that say which models play."""
    add = parser.add_argument
    add("--checkpoint", help="a folder, or the authors' .ckpt [newest in out/, else toy/lm]")
    add("--refiner", default="", help="folder of a refiner [newest in out/, else toy/refiner]")


def parse_arguments(argv):
    # The checkpoint decides the defaults of the other options.
    first = new_parser(add_help=False)
    add_models(first)
    first.add_argument("--no-refiner", action="store_true", help="play codebook 1 alone")
    known = first.parse_known_args(argv)[0]
    folder = Path(known.checkpoint) if known.checkpoint else newest_checkpoint()

    parser = new_parser(__doc__, parents=[first])
    parser.set_defaults(checkpoint=folder)
    add = parser.add_argument
    add("prompts", nargs="*", help="what to play, in words")
    add("--file", help="more prompts, one per line")
    add("--seconds", type=float, default=10.0, help="length of the music [10]")
    add("--seed", type=int, default=0, help="sample i of a prompt has seed SEED + i [0]")
    add("--n", type=int, default=1, help="samples of each prompt [1]")
    add_arguments(parser, Sampling, **stored_sampling(folder))
    add("--negative", default="", help="a prompt to move away from")
    add("--continue", dest="continue_file", metavar="FILE", help="audio to continue")
    add("--steps", type=int, help="of the refiner; the paper's are 100 [what it was stored with]")
    add("--out", help="a .wav, .flac or .ogg file, or a folder [PROMPT.wav here]")
    add("--play", action="store_true", help="play the sample while it is made")
    endless = "endless; each line of standard input is a new prompt"
    add("--follow", action="store_true", help=endless)
    add("--stream", action="store_true", help="write it to standard output, 16-bit mono PCM")
    args = parser.parse_args(argv)
    check_value("seconds", args.seconds, "(0, 1000000]")
    check_value("seed", args.seed, "[0, 4294967296)")
    check_value("n", args.n, "[1, 10000]")
    chosen = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    args.sampling = asdict(chosen) | dict(negative=args.negative)
    if args.refiner and args.no_refiner:
        raise ValueError("--refiner and --no-refiner do not go together")
    return args


def read_prompts(args):
    prompts = [prompt.strip() for prompt in args.prompts]
    if args.file:
        prompts += read_lines(args.file)
    if not prompts or not all(prompts):
        raise ValueError('say what to play, for example: python sample.py "jazz reggae"')
    for prompt in [*prompts, args.negative]:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"the prompt {prompt!r} is not valid UTF-8 text")
    return prompts


def output_paths(args, jobs):
    """One path per job, all different, in a folder that can be written to; the extension chooses
    the format."""
    out = Path(args.out or "")
    if out.suffix and not out.is_dir() and not args.out.endswith(("/", os.sep)):
        if out.suffix.lower() not in FORMATS:
            raise ValueError(f"{out}: the format must be one of {', '.join(FORMATS)}")
        paths = [out] * len(jobs)
    else:
        slugs = [re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_") for prompt, _ in jobs]
        slugs = [slug.encode()[:60].decode(errors="ignore") for slug in slugs]
        numbers = [f"-{seed}" if args.n > 1 else "" for _, seed in jobs]
        paths = [out / f"{slug or 'sample'}{n}.wav" for slug, n in zip(slugs, numbers)]
    if len({*paths}) < len(paths):
        paths = [path.with_stem(f"{path.stem}-{i}") for i, path in enumerate(paths)]
    ensure_writable(paths[0].parent)
    source = args.continue_file
    if source and any(path.exists() and path.samefile(source) for path in paths):
        raise ValueError(f"{source} would be replaced by its continuation: choose another --out")
    return paths


if __name__ == "__main__":
    entry(main)
