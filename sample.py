"""Plays a trained model: words in, music out.

    python sample.py "jazz reggae"                       jazz-reggae.wav and jazz-reggae.png
    python sample.py "slow piano waltz" "sad blues" --seconds 30 --n 4 --out waltz/
    python sample.py --file prompts.txt --out evening/   one prompt a line
    python sample.py "techno" --continue loop.wav        goes on where the file ends
    python sample.py "ambient" --seconds 600 --stream | aplay -f S16_LE -r 44100

Music of any length is made in constant memory and written while it is made; a file appears under
its name when it is finished. The same prompt and seed give the same audio, byte for byte, whatever
else is made beside it.

A checkpoint may say itself how it is best sampled (`toy.py ship`); the defaults in brackets hold
for one that does not.
"""

import argparse
import copy
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ssd_kernel
from audio import FORMATS, Picture, read_audio, write_stream
from checkpoint import load_checkpoint, load_text_encoder, read_config
from codec import decode_stream, load_codec
from diffusion import is_refiner, load_refiner, refine
from model import LMState, Mamba2, mamba_step
from options import entry, read_lines

ROOT = Path(__file__).parent
SHIPPED, SHIPPED_REFINER = ROOT / "toy" / "lm", ROOT / "toy" / "refiner"
SHOWCASE = ["jazz reggae", "a slow calm piano waltz"]
PLAYERS = (
    ["aplay", "-q", "-f", "S16_LE", "-c", "1", "-r"],
    ["play", "-q", "-t", "raw", "-e", "signed", "-b", "16", "-c", "1", "-", "-r"],
)


LARGE = 50_000_000  # parameters, from where on a step of one sample keeps the machine busy
LANES = 4  # samples that a smaller model makes at once


def prepared(lm, device):
    """The model on its device, as it samples best. A step reads every weight and does little else,
    so the matrices of a large model become bf16, half the bytes, where the hardware multiplies
    those. Vectors, convolutions and all states stay fp32. On a CPU with a C++ compiler the middle
    of Mamba-2 is compiled (it takes seconds, once), to pass over the states once, not four times.
    """
    device = torch.device(device)
    if is_large(lm):
        core = mamba_step
        if device.type == "cpu" and any(map(shutil.which, ("g++", "clang++"))):
            core = torch.compile(mamba_step, dynamic=False)
        for layer in lm.modules():
            if isinstance(layer, Mamba2):
                layer.core = core
            if isinstance(layer, nn.Linear) and multiplies_bf16(device):
                layer.weight.data = layer.weight.data.bfloat16()
    return lm.to(device)


def is_large(lm):
    return sum(p.numel() for p in lm.parameters()) >= LARGE


def multiplies_bf16(device):
    has = torch.cpu._is_avx512_bf16_supported
    return device.type == "cuda" or device.type == "cpu" and has()


def precision(lm):
    """The autocast that a `prepared` model runs under: bf16 where its matrices are."""
    weight = lm.heads[0].weight
    half = weight.dtype == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def guided(logits, guidance):
    """Classifier-free guidance: logits of both halves (2 B, ...) -> (B, ...)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def sample_tokens(logits, uniform, temperature=1.2, top_k=250, top_p=1.0):
    """One token per row by inverting the cumulative distribution.

    logits (..., V), uniform (...) in [0, 1) -> tokens (...). The last entry of the vocabulary, the
    special token, is never chosen. Keeps the top_k likeliest tokens, and of those the fewest whose
    probability reaches top_p.
    """
    logits = logits[..., :-1].float() / temperature
    p, tokens = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))  # sorted, likeliest first
    p = p * (p.cumsum(-1) - p < top_p)
    cumulative = p.cumsum(-1)
    choice = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice.clamp(max=tokens.shape[-1] - 1)).squeeze(-1)


@torch.inference_mode()
def generate(
    lm, encoder, prompts, frames, seeds, *, negative="", guidance=3.0, temperature=1.2, top_k=250,
    top_p=1.0, codes=None, block=64, lanes=None,
) -> Iterator[Tensor]:  # fmt: skip
    """Samples `frames` frames for each prompt; yields blocks (R, K, up to `block`) on the way.

    prompts: R strings; seeds: R integers; negative: the prompt of guidance's other half; codes
    (R, K, T): music to continue, which is not yielded again. Memory does not grow with `frames`
    (but for the Transformer, whose cache does).

    Classifier-free guidance: logits = without + guidance (with - without the prompt), both halves
    in one batch (SSMTTM IV-A).

    A sample depends on its prompt and its seed alone, to the last bit, however many others are made
    beside it: a matrix product of another height rounds differently, so the batch always runs in
    groups of `lanes`, the last filled up, and every prompt is read by itself. (By default LANES, or
    one where the model is large.)
    """
    lanes = lanes or (1 if is_large(lm) else LANES)
    if codes is None:
        codes = torch.empty(len(prompts), len(lm.heads), 0, dtype=torch.long)
    options = dict(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    groups = [
        _generate_lanes(
            lm, encoder, prompts[i : i + lanes], negative, frames, seeds[i : i + lanes],
            codes[i : i + lanes], block, lanes, **options,
        )
        for i in range(0, len(prompts), lanes)
    ]  # fmt: skip
    for blocks in zip(*groups):
        yield torch.cat(blocks)


def _generate_lanes(
    lm, encoder, prompts, negative, frames, seeds, codes, block, lanes,
    guidance, temperature, top_k, top_p,
):  # fmt: skip
    rows, K, device = len(prompts), len(lm.heads), next(lm.parameters()).device
    codes, fill = codes.to(device), lanes - rows
    room, step = frames + K - 1, None
    width = 1 if lm.config.prefix else encoder.max_tokens  # cross-attention sees one width

    def read(prompt, row):
        with precision(lm):
            return lm.prefill(*encoder([prompt], width), codes[row : row + 1], room)

    first = [read(prompt, row) for row, prompt in enumerate(prompts)]
    first += first[:1] * fill
    if guidance != 1:
        unread = (
            [read(negative, row) for row in range(rows)]
            if codes.shape[2]
            else [read(negative, 0)] * rows
        )
        first += unread + unread[:1] * fill
    logits = torch.cat([logits for logits, _ in first])  # (lanes or 2 lanes, K, V)
    state = _stack([state for _, state in first])

    # Columns that are (partly) known before sampling begins: the fine codebooks of the music to
    # continue lag behind its coarse ones, and of nothing at all they are "not yet".
    known = lm.delay(codes)[:, :, codes.shape[2] + 1 :]  # (rows, K, K - 1)
    known = torch.cat([known, known[:1].expand(fill, -1, -1)])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    columns, done = [], []
    for s in range(frames + K - 1):
        if s % block == 0:
            uniform = torch.stack([torch.rand(block, K, generator=g) for g in generators])
            uniform = torch.cat([uniform, uniform[:1].expand(fill, -1, -1)]).to(device)
        if guidance != 1:
            logits = guided(logits, guidance)
        column = sample_tokens(
            logits, uniform[:, s % block], temperature, top_k, top_p
        )  # (lanes, K)
        if s < K - 1:
            column[:, s + 1 :] = known[:, s + 1 :, s]
        columns = (columns + [column])[-K:]
        if len(columns) == K:  # frame s - K + 1 has all its codebooks now
            done.append(torch.stack([columns[k][:rows, k] for k in range(K)], 1))
        if len(done) == block or s == frames + K - 2:
            yield torch.stack(done, 2).cpu()
            done = []
        if s < frames + K - 2:
            column = column if guidance == 1 else torch.cat([column, column])
            with precision(lm):
                step = step or _stepper(lm, column, state)
                logits = step(column)


def _stepper(lm, column, state):
    """lm.step with this state, as a function of the column; on a GPU it is recorded as a CUDA graph
    and replayed, one launch instead of a few hundred."""
    if column.device.type != "cuda":
        return lambda column: lm.step(column, state)
    column = column.clone()  # a graph reads and writes the same memory at every replay
    remembered = [state.position, *(v for block in state.blocks for layer in block for v in layer)]
    before = [v.clone() for v in remembered]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        lm.step(column, state)  # kernels are compiled and libraries woken up outside the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = lm.step(column, state)
    for v, old in zip(remembered, before):
        v.copy_(old)

    def replay(new):
        column.copy_(new)
        graph.replay()
        return logits

    return replay


def _stack(states):
    """Joins the LMStates of single rows into that of a batch."""
    blocks = [
        [type(layer[0])(*map(torch.cat, zip(*layer))) for layer in zip(*block)]
        for block in zip(*(state.blocks for state in states))
    ]
    position, tempo = (torch.cat(v) for v in zip(*(state[1:] for state in states)))
    return LMState(blocks, position, tempo)


def main(argv=None):
    args = parse_arguments(argv)
    prompts = read_prompts(args)
    folder = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
    system = System(folder, None if args.no_refiner else args.refiner or "")
    lm, encoder, codec, second = system.lm, system.encoder, system.codec, system.second
    sampling = system.sampling | given(args, "guidance temperature top_k top_p")
    refining = system.refining | given(args, "steps")
    if second and refining.get("steps", 1) > (T := system.refiner.config.timesteps):
        raise ValueError(f"--steps must be at most {T}, which this refiner was trained with")
    say = lambda text: print(text, file=sys.stderr if args.stream else sys.stdout)
    shape = f"{lm.config.blocks} blocks, {lm.config.codebooks} codebook(s)"
    say(f"{folder}: {lm.config.variant}, {shape}" + (f"; refined by {second}" if second else ""))
    if lm.config.variant != "transformer":
        say(ssd_kernel.path(next(lm.parameters()).device))
    for prompt in prompts:
        if encoder.too_long(prompt):
            say(f"the prompt is cut to its first {encoder.max_tokens} tokens: {prompt[:60]}...")

    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n)]
    if live := args.stream or args.play:
        jobs = jobs[:1]
    paths = [] if live else output_paths(args, jobs)
    frames = max(1, round(args.seconds * codec.sample_rate / codec.hop))
    heard = known = None
    if args.continue_file:
        heard = codec.encode(read_audio(args.continue_file))  # (1, 9, T)
        known = heard[:, : lm.config.codebooks, -lm.config.trained_frames :]
        known = known.expand(len(jobs), -1, -1)
    blocks = generate(
        lm, encoder, [p for p, _ in jobs], frames, [s for _, s in jobs],
        negative=args.negative, codes=known, **sampling,
    )  # fmt: skip

    def audio(prompt, seed, pieces):
        """From the first stage's codes, (k, l) at a time, to audio, 1.5 s at a time."""
        before = None if heard is None else heard[0, :, : None if second else lm.config.codebooks]
        if second:
            pieces = system.refine(prompt, pieces, seed, heard=before, **refining)
        pieces = pieces if before is None else itertools.chain([before], pieces)
        return decode_stream(codec, pieces)

    started = time.time()
    bar = tqdm(blocks, total=-(-frames // 64), unit="block", disable=None, leave=False)
    if heard is not None:
        frames += heard.shape[2]
    if live:
        play(audio(*jobs[0], (block[0] for block in bar)), codec.sample_rate, args.stream)
        return
    if len(jobs) == 1:  # decoded and written while it is made
        sources = [(block[0] for block in bar)]
    else:  # codes are small: all of them first, as uint16, then one file after the other
        codes = np.concatenate([block.numpy().astype(np.uint16) for block in bar], 2)
        sources = [[torch.from_numpy(one.astype(np.int64))] for one in codes]
    for (prompt, seed), path, source in zip(jobs, paths, sources):
        picture = Picture(frames * codec.hop)
        write_stream(path, picture.watch(audio(prompt, seed, source)))
        picture.save(path.with_suffix(".png"), f"{prompt} (seed {seed})", codec.sample_rate)
        say(f"{path} and {path.with_suffix('.png').name}")
    seconds, took = len(jobs) * frames * codec.hop / codec.sample_rate, time.time() - started
    say(f"{seconds:.1f} s of audio in {took:.1f} s")


class System:
    """A language model and, where there is one for its codes, a second stage, ready to play.
    refiner: its folder; empty: as `find_refiner` finds it; None: none."""

    def __init__(self, folder, refiner=""):
        config = read_config(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lm, self.encoder = load_checkpoint(folder), load_text_encoder(folder).to(device)
        self.codec = load_codec(config["codec"])
        self.second = None if refiner is None else find_refiner(lm, self.codec, refiner)
        self.lm = prepared(lm, device)
        self.sampling, self.refining = config.get("sampling", {}), {}  # options they shipped with
        if self.second:
            self.refiner = load_refiner(self.second).to(device)
            self.its_encoder = load_text_encoder(self.second).to(device)
            self.its_codec = self.codec
            if device != "cpu":  # the refiner's is beside it; the other one decodes, on the CPU
                self.its_codec = copy.deepcopy(self.codec).to(device)
            self.refining = read_config(self.second).get("sampling", {})

    def refine(self, prompt, pieces, seed, **options):
        """First-codebook codes, (1, l) at a time -> those of all codebooks (see `diffusion`)."""
        parts = self.refiner, self.its_encoder, self.its_codec
        return refine(*parts, prompt, pieces, seed, **options)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompts", nargs="*", help="what to play, in words")
    add("--file", help="more prompts, one a line")
    add("--seconds", type=float, default=10.0, help="length, of any size [10]")
    add("--seed", type=int, default=0, help="sample i of a prompt has the seed SEED + i [0]")
    add("--n", type=int, default=1, help="samples of each prompt [1]")
    add("--guidance", type=float, help="how strictly to follow the text; 1: plainly [3]")
    add("--temperature", type=float, help="how adventurous each token is [1.2]")
    add("--top-k", type=int, help="choose among the K likeliest tokens [250]")
    add("--top-p", type=float, help="... and of those the fewest that reach this share [1]")
    add("--negative", default="", help="a prompt to move away from")
    add("--continue", dest="continue_file", metavar="FILE", help="audio to go on from")
    add("--steps", type=int, help="of the refiner: more are slower, and 100 are the paper's [25]")
    add("--no-refiner", action="store_true", help="play the first stage's codes alone")
    add("--checkpoint", help="a folder, or the authors' .ckpt [the newest in out/, else in toy/]")
    add("--refiner", help="folder of a refiner [the newest in out/, else the one in toy/]")
    add("--out", help="a .wav, .flac or .ogg file, or a folder [PROMPT.wav here]")
    add("--play", action="store_true", help="play the (first) sample while it is made")
    add("--stream", action="store_true", help="write it to standard output, 16-bit mono PCM")
    args = parser.parse_args(argv)
    positive = dict(seconds=0, n=0, temperature=0, top_k=0, top_p=0, steps=0)
    for name, low in positive.items():
        if (value := getattr(args, name)) is not None and not value > low:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than {low}, not {value}")
    for name in ("seconds", "guidance"):
        if (value := getattr(args, name)) is not None and not np.isfinite(value):
            raise ValueError(f"--{name} must be a finite number, not {value}")
    return args


def given(args, names):
    """The options among `names` that the user set; the rest is the checkpoint's to say."""
    return {k: v for k in names.split() if (v := getattr(args, k)) is not None}


def read_prompts(args):
    prompts = list(args.prompts)
    if args.file:
        prompts += [line for line in read_lines(args.file) if line.strip()]
    prompts = [prompt.strip() for prompt in prompts]
    if not prompts or not all(prompts):
        raise ValueError('say what to play, for example: python sample.py "jazz reggae"')
    return prompts


def newest_checkpoint(refiner=False):
    """best/ of the user's newest run (of a refiner, or of a language model), else what ships."""
    runs = [p.parent for p in Path("out").glob("*/best/config.json")]
    runs = [run for run in runs if is_refiner(read_config(run)) == refiner]
    shipped = SHIPPED_REFINER if refiner else SHIPPED
    return max(runs, key=lambda p: p.stat().st_mtime, default=shipped)


def find_refiner(lm, codec, folder=None):
    """The folder of a second stage for this language model: the one given, else the newest of the
    user's, else what ships; None where there is nothing to refine, or none to do it."""
    if lm.config.codebooks > 1:
        return None
    if folder and (name := read_config(folder).get("codec")) != codec.name:
        raise ValueError(f"{folder} refines codes of {name}, the model's are {codec.name}")
    folder = Path(folder) if folder else newest_checkpoint(refiner=True)
    return folder if read_config(folder).get("codec") == codec.name else None


def output_paths(args, jobs):
    """One path a job, told apart by prompt and seed; extensions choose the format."""
    out = Path(args.out) if args.out else Path()
    if out.suffix and not out.is_dir():
        if out.suffix.lower() not in FORMATS:
            raise ValueError(f"{out}: the format must be one of {', '.join(FORMATS)}")
        names = [out] if len(jobs) == 1 else [
            out.with_stem(f"{out.stem}-{i}") for i in range(len(jobs))
        ]  # fmt: skip
    else:
        slugs = [re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60] for prompt, _ in jobs]
        names = [
            out / f"{slug or 'sample'}{f'-{seed}' if args.n > 1 else ''}.wav"
            for slug, (_, seed) in zip(slugs, jobs)
        ]
        # Two prompts that differ past their 60th letter still get a file each.
        names = [
            n if n not in names[:i] else n.with_stem(f"{n.stem}-{i}") for i, n in enumerate(names)
        ]
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
    return names


def play(chunks, sample_rate, to_stdout):
    if to_stdout:
        sink, player = sys.stdout.buffer, None
    else:
        command = next((c for c in PLAYERS if shutil.which(c[0])), None)
        if command is None:
            raise ValueError("--play needs `aplay` or sox's `play`: apt-get install alsa-utils")
        player = subprocess.Popen([*command, str(sample_rate)], stdin=subprocess.PIPE)
        sink = player.stdin
    try:
        for chunk in chunks:
            sink.write((chunk.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())
            sink.flush()
    except BrokenPipeError:  # the listener had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if player:
        player.stdin.close()
        player.wait()


if __name__ == "__main__":
    entry(main)
