"""How fast the SSD and the language models are, next to other libraries.

    python -m experiments.bench ssd       the SSD, forward and backward, against installed peers
    python -m experiments.bench step      a training step of each language model
    python -m experiments.bench decode    a step of sampling, against MusicGen-small
    python -m experiments.bench errors    errors of the SSD against float64 (gpu.py)
    python -m experiments.bench gpu       all of these, the tests, 300 training steps (gpu.py)
    TRITON_INTERPRET=1 python -m experiments.bench gpu --rehearse    the same on a CPU, small

Prints Markdown. Weights are random. Times are medians: of triton.testing.do_bench on a GPU, which
clears the cache between calls, of torch.utils.benchmark on a CPU. Letters are model.py's.
"""

import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils import benchmark

import ssd_kernel
from audio import FRAME_RATE
from model import VARIANTS, LMConfig, MusicLM, ssd_chunked
from options import entry, new_parser
from paper import budget
from sample import guided, multiplies_bf16, precision, prepare, sample_tokens, step_function
from train import PRESETS, TrainConfig

ROOT = Path(__file__).parents[1]
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


def seconds(function):
    """The median time of a call."""
    if GPU:
        from triton.testing import do_bench

        return do_bench(function, return_mode="median") / 1e3
    timer = benchmark.Timer("f()", globals=dict(f=function), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


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


def implementation(name):
    """An SSD, a function of (x, dt, A, B, C, D, chunk). Raises what an import raises."""
    if name == "kernels" and not RUNS_KERNELS:
        raise ValueError("needs a GPU")
    if name in ("kernels", "PyTorch"):
        return ssd_kernel.ssd if name == "kernels" else ssd_chunked
    heads = lambda v: v[:, :, None]
    if name == "fla":
        from fla.ops.simple_gla import chunk_simple_gla

        def scan(x, dt, A, B, C, D, chunk):
            k, q = (heads(v).expand(-1, -1, x.shape[2], -1).contiguous() for v in (B, C))
            y, _ = chunk_simple_gla(q, k, x * dt[..., None].to(x.dtype), g=dt * A, scale=1.0)
            return y + D[:, None].to(x.dtype) * x

        return scan
    if name == "mamba_ssm":
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as peer
    else:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan as peer
    return lambda x, dt, A, B, C, D, chunk: peer(x, dt, A, heads(B), heads(C), chunk, D=D)


def ssd(sizes):
    product = budget.products_per_second(DEVICE)
    block = torch.empty(2**28 if GPU else 2**24, dtype=torch.uint8, device=DEVICE)
    copy = 2 * block.numel() / seconds(block.clone)
    rows = []
    for B, L, H, P, N in sizes.shapes:
        # The bytes of all operands and states, and the products of the chunked algorithm.
        moved = 2 * B * L * (5 * H * P + 6 * N + 5 * H * P * N / sizes.chunk)
        least = max(moved / copy, B * L * H * P * (12 * N + 3 * sizes.chunk) / product)
        rows.append([N, "lower bound at this device's rates", "-", f"{1e3 * least:.3f}", "-"])
        args = inputs((B, L, H, P, N), torch.bfloat16 if GPU else torch.float32)
        for name in ("kernels", "PyTorch", "mamba_ssm", "fla", "transformers"):
            try:
                scan = implementation(name)

                def forward(scan=scan, args=args):
                    y = scan(**args, chunk=sizes.chunk)
                    return y[0] if isinstance(y, tuple) else y

                def both(forward=forward, args=args):
                    torch.autograd.grad(forward(), [*args.values()], args["x"].detach())

                cells = f"{1e3 * seconds(forward):.3f}", f"{1e3 * seconds(both):.3f}", peak(both)
            except Exception as error:  # not installed, out of memory, no kernel for this shape
                cells = f"{type(error).__name__}: {error}".splitlines()[0][:60], "-", "-"
            rows.append([N, name, *cells])
    return table(["N", "", "forward, ms", "forward + backward, ms", "peak GB"], rows)


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


def step(sizes):
    """A training step. "counted": what `train.py --dry-run` says of its memory."""
    config = TrainConfig(**PRESETS["paper"] | dict(compile=False))
    product = budget.products_per_second(DEVICE)
    codes = torch.randint(1024, (sizes.batch, 1, sizes.frames), device=DEVICE)
    rows = []
    for variant in VARIANTS:
        lm = language_model(sizes, variant)
        lm.recompute = config.recompute
        count = budget.parameters(lm.config)
        counted = budget.memory(lm.config, config, count, 0, sizes.frames, sizes.batch)
        train = trainer(lm, sizes.batch)
        run = lambda: train(codes)  # noqa: B023
        run()  # compiles kernels
        took = seconds(run)
        cells = f"{count / 1e6:.1f}", f"{1e3 * took:.0f}", f"{codes.numel() / took:,.0f}"
        cells += f"{6 * count * codes.numel() / took / product:.0%}", peak(run)
        rows.append([variant, *cells, f"{sum(counted.values()) / 1e9:.2f}"])
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
                took = seconds(lambda: sample_tokens(guided(run(), 3), uniform))  # noqa: B023
                rate = 1 / took / (50 if theirs else FRAME_RATE)
                size = sum(v.nbytes for v in state) / 1e6
                cells = f"{1e3 * took:.2f}", f"{rate:.2f}", f"{size:.1f}", peak(run)
                rows.append([name, kind, at, *cells])
    header = ["", "", "at, s", "ms", "seconds of audio per second", "state, MB", "peak GB"]
    return table(header, rows)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("what", choices=["ssd", "step", "decode", "errors", "gpu"])
    parser.add_argument("--rehearse", action="store_true", help="at small sizes")
    args = parser.parse_args(argv)
    from experiments import gpu

    parts = dict(ssd=ssd, step=step, decode=decode, errors=gpu.errors, gpu=gpu.page)
    print(parts[args.what](SMALL if args.rehearse else FULL))


if __name__ == "__main__":
    entry(main)
