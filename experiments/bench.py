"""How fast the SSD and the language models are, next to other libraries, and how exact.

    python -m experiments.bench ssd       the SSD, forward and backward, against installed peers
    python -m experiments.bench step      a training step of each language model
    python -m experiments.bench decode    a step of sampling, against MusicGen-small
    python -m experiments.bench errors    errors of the SSD against float64
    python -m experiments.bench gpu       on one page, in under ten minutes: all of these, the
                                          kernels' tests, and 300 training steps
    TRITON_INTERPRET=1 python -m experiments.bench gpu --rehearse    the same on a CPU, small

Prints Markdown. Weights are random. Times are medians. Letters are model.py's.
"""

import math
import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

import ssd_kernel
from audio import FRAME_RATE
from data import Clips
from model import VARIANTS, LMConfig, MusicLM, ssd_chunked, ssd_recurrent
from options import entry, new_parser
from paper.budget import median_seconds, memory, products_per_second
from sample import ROOT, guided, multiplies_bf16, precision, prepare, sample_tokens, step_function
from toy import corpus
from train import PRESETS, TrainConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
RUNS_KERNELS = GPU or "TRITON_INTERPRET" in os.environ

# Shapes of an SSD are (B, L, H, P, N). lm and musicgen: changes to the models' own sizes.
FULL = SimpleNamespace(
    shapes=[(4, 2600, 32, 64, 512), (4, 2600, 32, 64, 128)] if GPU else [(4, 862, 8, 32, 32)],
    chunk=256 if GPU else 64, lm={}, musicgen={}, batch=4, frames=2584, steps=300,
    errors=(2, 32, 64), lengths=(300, 1500), tests=[], page="results/gpu.md",
)  # fmt: skip
SMALL = SimpleNamespace(
    shapes=[(1, 40, 2, 16, 16)], chunk=16, batch=2, frames=48, steps=20,
    lm=dict(blocks=2, d_model=64, d_state=16, headdim=16, chunk=16, attention_heads=4),
    musicgen=dict(num_hidden_layers=2, hidden_size=64, ffn_dim=64, num_attention_heads=4),
    errors=(1, 16, 16), lengths=(30, 60), tests=["-k", "hand or frames"], page="out/rehearsal.md",
)  # fmt: skip


def milliseconds(function):
    return f"{1e3 * median_seconds(function):.3g}"


def peak(function):
    """Gigabytes in use at the peak of a call, on a GPU."""
    if not GPU:
        return "-"
    torch.cuda.reset_peak_memory_stats()
    function()
    return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ------------------------------------------------------------------------------------------ the SSD


def inputs(shape, dtype, decay=1.0):
    """Arguments of an SSD as Mamba-2's initialisation makes them; `decay` scales dt."""
    B, L, H, P, N = shape
    g = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=g).to(dtype)
    dt = torch.empty(B, L, H).uniform_(math.log(1e-3), math.log(1e-1), generator=g).exp() * decay
    args = dict(x=normal(B, L, H, P), dt=dt, A=-torch.empty(H).uniform_(1, 16, generator=g))
    args |= dict(B=normal(B, L, N), C=normal(B, L, N) / N**0.5, D=torch.ones(H))
    return {name: v.to(DEVICE).requires_grad_() for name, v in args.items()}


def kernels(x, dt, A, B, C, D, chunk):
    if not RUNS_KERNELS:
        raise ValueError("needs a GPU")
    return ssd_kernel.ssd(x, dt, A, B, C, D, chunk=chunk)


def mamba_ssm(x, dt, A, B, C, D, chunk):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan

    return scan(x, dt, A, B[:, :, None], C[:, :, None], chunk, D=D)


def fla(x, dt, A, B, C, D, chunk):
    from fla.ops.simple_gla import chunk_simple_gla as scan

    k, q = (v[:, :, None].expand(-1, -1, x.shape[2], -1).contiguous() for v in (B, C))
    y, _ = scan(q, k, x * dt[..., None].to(x.dtype), g=dt * A, scale=1.0)
    return y + D[:, None].to(x.dtype) * x


def transformers(x, dt, A, B, C, D, chunk):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan as scan

    return scan(x, dt, A, B[:, :, None], C[:, :, None], chunk, D=D)


def ssd(sizes):
    block = torch.empty(2**28 if GPU else 2**24, dtype=torch.uint8, device=DEVICE)
    copy, product = 2 * block.numel() / median_seconds(block.clone), products_per_second(DEVICE)
    rows = []
    for B, L, H, P, N in sizes.shapes:
        # The bytes of all operands and states, and the products of the chunked algorithm.
        moved = 2 * B * L * (5 * H * P + 6 * N + 5 * H * P * N / sizes.chunk)
        least = max(moved / copy, B * L * H * P * (12 * N + 3 * sizes.chunk) / product)
        rows.append([N, "lower bound at this device's rates", "-", f"{1e3 * least:.3g}", "-"])
        args = inputs((B, L, H, P, N), torch.bfloat16 if GPU else torch.float32)
        for scan in (kernels, ssd_chunked, mamba_ssm, fla, transformers):

            def forward(scan=scan, args=args):
                y = scan(**args, chunk=sizes.chunk)
                return y[0] if isinstance(y, tuple) else y

            def both(forward=forward, args=args):
                torch.autograd.grad(forward(), [*args.values()], args["x"].detach())

            try:
                cells = milliseconds(forward), milliseconds(both), peak(both)
            except Exception as error:  # not installed, out of memory, no kernel for this shape
                cells = f"{type(error).__name__}: {error}".splitlines()[0][:60], "-", "-"
            rows.append([N, scan.__name__, *cells])
    return table(["N", "", "forward, ms", "forward + backward, ms", "peak GB"], rows)


def errors(sizes):
    """Relative errors of the SSD, in norm, against the loop in float64 from the same inputs."""
    ways = [("PyTorch", ssd_chunked), ("kernels", ssd_kernel.ssd)]
    short, long = sizes.lengths
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # The interpreter's products of bf16 are wrong.
        runs = RUNS_KERNELS and (GPU or dtype != torch.bfloat16)
        for L, decay in [(short, 1.0), (long, 1.0), (short, 0.01), (short, 100.0)]:
            args = inputs((1, L, *sizes.errors), dtype, decay)
            exact = {name: v.detach().double().requires_grad_() for name, v in args.items()}
            expected = outputs_and_gradients(ssd_recurrent, exact)
            for name, function in ways if runs else ways[:1]:
                found = outputs_and_gradients(function, args, chunk=64)
                cells = [(a.double() - b).norm() / b.norm() for a, b in zip(found, expected)]
                rows.append([str(dtype)[6:], L, decay, name, *(f"{cell:.1e}" for cell in cells)])
    header = ["dtype", "L", "dt times", "", "y", "state", *("d" + name for name in args)]
    return table(header, rows)


def outputs_and_gradients(function, args, **options):
    y, state = function(**args, **options)
    g = torch.Generator().manual_seed(0)
    loss = sum((v * torch.randn(v.shape, generator=g).to(DEVICE)).sum() for v in (y, state))
    return [y, state, *torch.autograd.grad(loss, [*args.values()])]


# ------------------------------------------------------------------------------ the language models


def language_model(sizes, variant):
    torch.manual_seed(0)
    with DEVICE:
        return MusicLM(LMConfig(variant=variant, **sizes.lm))


def trainer(lm, batch):
    """A function that trains on codes (B,1,L), without text, and returns the loss."""
    optimizer = torch.optim.AdamW(lm.train().parameters(), 1e-4, fused=True)
    text = torch.zeros(batch, 8, lm.config.d_text, device=DEVICE)

    def train(codes):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=multiplies_bf16(DEVICE)):
            logits = lm(codes, text, text[..., 0] == 0)
        loss = F.cross_entropy(logits.float().flatten(0, 2), codes.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return train


def learn(sizes):
    """Simba trains on toy clips. ValueError unless its loss falls, as with the SSD in PyTorch."""
    clips = Clips(corpus.folder(), "train", 1)
    size = sizes.batch, min(862, sizes.frames)

    def losses(steps):
        train = trainer(language_model(sizes, "simba"), sizes.batch)
        batches = (clips.batch(i * size[0], *size, 0, lambda *_: "")[0] for i in range(steps))
        return [train(codes.to(DEVICE)) for codes in batches]

    found = losses(sizes.steps)
    with mock.patch.object(ssd_kernel, "available", lambda x: False):
        apart = max(abs(a - b) for a, b in zip(found, losses(10)))
    first, last = (sum(part) / 10 for part in (found[:10], found[-10:]))
    text = f"Loss of the first ten of {sizes.steps} steps {first:.3f}, of the last ten {last:.3f}; "
    text += f"with the SSD in PyTorch the first ten are at most {apart:.4f} apart."
    if not last < first or apart > 0.2:
        raise ValueError(text)
    return text


def step(sizes):
    """A training step. "counted": what `train.py --dry-run` says of its memory."""
    length = sizes.frames / FRAME_RATE
    options = dict(compile=False, batch=sizes.batch, seconds=length, crop=length)
    config = TrainConfig(**PRESETS["paper"] | options)
    product = products_per_second(DEVICE)
    codes = torch.randint(1024, (sizes.batch, 1, sizes.frames), device=DEVICE)
    rows = []
    for variant in VARIANTS:
        lm = language_model(sizes, variant)
        lm.recompute = config.recompute
        count = sum(p.numel() for p in lm.parameters())
        counted = sum(memory(lm.config, config, 0).values())
        run = partial(trainer(lm, sizes.batch), codes)
        took = median_seconds(run)
        cells = f"{count / 1e6:.1f}", f"{1e3 * took:.0f}", f"{codes.numel() / took:,.0f}"
        cells += f"{6 * count * codes.numel() / took / product:.0%}", peak(run)
        rows.append([variant, *cells, f"{counted / 1e9:.2f}"])
    return table(["", "M parameters", "ms", "tokens/s", "MFU", "peak GB", "counted GB"], rows)


def open_ours(sizes, variant, at):
    """A model `at` seconds into a piece -> {name: a step, which returns logits}, its state."""
    lm = prepare(language_model(sizes, variant).eval(), DEVICE)
    text = torch.randn(2, 16, lm.config.d_text, device=DEVICE)  # two rows, for guidance
    column = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    position = round(at * FRAME_RATE)
    with precision(lm):
        _, state = lm.prefill(text, text[..., 0] < 9, room=position + 2)
        runs = {"": lambda column: lm.step(column, state)}
        if GPU:
            runs["CUDA graph"] = step_function(lm, column, state)

    def step(run):
        state.position.fill_(position)
        with precision(lm):
            return run(column)

    state_tensors = [v for block in state.blocks for layer in block for v in layer or ()]
    return {name: partial(step, run) for name, run in runs.items()}, state_tensors


def open_musicgen(sizes, at):
    """The same for MusicGen-small's decoder in transformers: 50 frames per second, 4 codebooks."""
    from transformers import DynamicCache, EncoderDecoderCache, MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    config = MusicgenDecoderConfig(**sizes.musicgen)
    kind = dict(device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    decoder = MusicgenForCausalLM(config).to(**kind).eval()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    heads = config.num_attention_heads
    past = torch.zeros(2, heads, 50 * at, config.hidden_size // heads, **kind)
    for layer in range(config.num_hidden_layers):
        cache.self_attention_cache.update(past, past, layer)
    ids = torch.zeros(8, 1, dtype=torch.long, device=DEVICE)
    options = dict(encoder_hidden_states=torch.randn(2, 16, config.hidden_size, **kind))
    options |= dict(past_key_values=cache, use_cache=True)
    step = lambda: decoder(ids, **options).logits[:, -1].view(2, 4, -1)
    return {"": step}, [past] * 2 * config.num_hidden_layers


@torch.inference_mode()
def decode(sizes):
    """A step of sampling with guidance, early and late in a piece."""
    rows = []
    for name in [*VARIANTS, "MusicGen-small"]:
        theirs = name == "MusicGen-small"
        for at in (10, 30) if theirs or name == "transformer" else (10, 600):
            steps, state = open_musicgen(sizes, at) if theirs else open_ours(sizes, name, at)
            for kind, run in steps.items():
                uniform = torch.rand(1, 4 if theirs else 1, device=DEVICE)
                took = median_seconds(lambda: sample_tokens(guided(run(), 3), uniform))  # noqa: B023
                rate = 1 / took / (50 if theirs else FRAME_RATE)
                size = sum(v.nbytes for v in state) / 1e6
                cells = f"{1e3 * took:.2f}", f"{rate:.2f}", f"{size:.1f}", peak(run)
                rows.append([name, kind, at, *cells])
    header = ["", "", "at, s", "ms", "seconds of audio per second", "state, MB", "peak GB"]
    return table(header, rows)


# ------------------------------------------------------------------------------------ one page ----


def tests(sizes):
    """The tests of the kernels, which on a GPU run there."""
    command = [sys.executable, "-m", "pytest", "-n", "8", "test_ssd.py", "tests/test_kernel.py"]
    command += sizes.tests
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    if run.returncode:
        raise ValueError(run.stdout[-2000:])
    return run.stdout.splitlines()[-1]


def gpu(sizes, parts=(tests, ssd, errors, learn, decode, step)):
    """The page. It is written after every part, and a part that fails does not stop the others."""
    file = ROOT / sizes.page
    file.parent.mkdir(exist_ok=True)
    text = f"# {torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}\n"
    failed = []
    for part in parts:
        begun = time.time()
        try:
            result = part(sizes)
        except Exception as error:
            failed.append(part.__name__)
            result = f"Failed: {type(error).__name__}: {error}"
        text += f"\n## {part.__name__}\n\n{result}\n\n({time.time() - begun:.0f} s)\n"
        file.write_text(text, encoding="utf-8")
        torch.cuda.empty_cache()
    if failed:
        raise ValueError(f"{', '.join(failed)} failed: see {file}")
    return text


def main(argv=None):
    parser = new_parser(__doc__)
    parts = {part.__name__: part for part in (ssd, step, decode, errors, gpu)}
    parser.add_argument("what", choices=parts)
    parser.add_argument("--rehearse", action="store_true", help="at small sizes")
    args = parser.parse_args(argv)
    print(parts[args.what](SMALL if args.rehearse else FULL))


if __name__ == "__main__":
    entry(main)
