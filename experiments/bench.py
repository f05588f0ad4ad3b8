"""How fast the SSD and the language models are, next to other libraries, and how exact.

    python -m experiments.bench ssd       the SSD, forward and backward, against installed peers
    python -m experiments.bench errors    errors of the SSD against float64
    python -m experiments.bench decode    a step of sampling, against MusicGen-small
    python -m experiments.bench step      steps of train.py: time, memory, and does the loss fall?
    python -m experiments.bench gpu       all of these and the kernels' tests, on one page

Prints Markdown. Weights are random. Times are medians. Letters are model.py's.
"""

import math
import os
import pkgutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch

import ssd_kernel
from audio import FRAME_RATE
from data import read_jsonl
from evaluate import markdown
from model import VARIANTS, LMConfig, MusicLM, ssd_chunked, ssd_recurrent
from options import entry, new_parser
from paper.budget import median_seconds, memory, parameters, products_per_second
from paper.distributed import Processes
from sample import ROOT, guided, precision, prepare, sample_tokens, step_function
from train import parse_arguments, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"

# Shapes of an SSD are (B, L, H, P, N). lm and musicgen: changes to the models' own sizes.
SIZES = SimpleNamespace(
    shapes=[(4, 2600, 32, 64, 512), (4, 2600, 32, 64, 128)] if GPU else [(4, 862, 8, 32, 32)],
    chunk=256 if GPU else 64, errors=(2, 32, 64), lengths=(300, 1500), lm={}, musicgen={},
    train="--preset paper --accumulate 1 --steps 60 --lr 1e-3 --warmup 10 --no-compile",
)  # fmt: skip


def peak(function):
    """Gigabytes in use at the peak of a call, on a GPU."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    function()
    return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if GPU else "-"


def inputs(shape, dtype, decay=1.0):
    """Arguments of an SSD as Mamba-2's initialisation makes them; `decay` scales dt."""
    B, L, H, P, N = shape
    g = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=g).to(dtype)
    dt = torch.empty(B, L, H).uniform_(math.log(1e-3), math.log(1e-1), generator=g).exp() * decay
    args = dict(x=normal(B, L, H, P), dt=dt, A=-torch.empty(H).uniform_(1, 16, generator=g))
    args |= dict(B=normal(B, L, N), C=normal(B, L, N) / N**0.5, D=torch.ones(H))
    return {name: v.to(DEVICE).requires_grad_() for name, v in args.items()}


def peer(name, x, dt, A, B, C, D, chunk):
    return pkgutil.resolve_name(name)(x, dt, A, B[:, :, None], C[:, :, None], chunk, D=D)


SCANS = {
    "kernels": ssd_kernel.ssd,
    "PyTorch": ssd_chunked,
    "mamba_ssm": partial(peer, "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined"),
    "transformers": partial(peer, "transformers.models.mamba2.modeling_mamba2:mamba2_chunk_scan"),
}


def forward(scan, args, chunk):
    y = scan(**args, chunk=chunk)
    return y[0] if isinstance(y, tuple) else y


def both(scan, args, chunk):
    y = forward(scan, args, chunk)
    torch.autograd.grad(y, [*args.values()], torch.ones_like(y))


def ssd():
    rows = []
    for shape in SIZES.shapes:
        args = inputs(shape, torch.bfloat16 if GPU else torch.float32)
        for name, scan in SCANS.items():
            runs = [partial(run, scan, args, SIZES.chunk) for run in (forward, both)]
            try:
                cells = [f"{1e3 * median_seconds(run):.3g}" for run in runs] + [peak(runs[1])]
            except Exception as error:  # not installed, out of memory, no kernel for this shape
                cells = [f"{type(error).__name__}: {error}".splitlines()[0][:60], "-", "-"]
            rows.append([shape[-1], name, *cells])
    return markdown(["N", "", "forward, ms", "forward + backward, ms", "peak GB"], rows)


def errors():
    """Relative errors of the SSD, in norm, against the loop in float64 from the same inputs."""
    short, long = SIZES.lengths
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ways = {"PyTorch": ssd_chunked}
        # Kernels need a GPU, or Triton's interpreter, whose products of bf16 are wrong.
        if GPU or ("TRITON_INTERPRET" in os.environ and dtype != torch.bfloat16):
            ways["kernels"] = ssd_kernel.ssd
        for L, decay in [(short, 1.0), (long, 1.0), (short, 0.01), (short, 100.0)]:
            args = inputs((1, L, *SIZES.errors), dtype, decay)
            exact = {name: v.detach().double().requires_grad_() for name, v in args.items()}
            expected = outputs_and_gradients(ssd_recurrent, exact)
            for name, function in ways.items():
                found = outputs_and_gradients(function, args, chunk=64)
                cells = [(a.double() - b).norm() / b.norm() for a, b in zip(found, expected)]
                rows.append([str(dtype)[6:], L, decay, name, *(f"{cell:.1e}" for cell in cells)])
    return markdown(["dtype", "L", "dt times", "", "y", "state", *("d" + a for a in args)], rows)


def outputs_and_gradients(function, args, **options):
    y, state = function(**args, **options)
    g = torch.Generator().manual_seed(0)
    loss = sum((v * torch.randn(v.shape, generator=g).to(DEVICE)).sum() for v in (y, state))
    return [y, state, *torch.autograd.grad(loss, [*args.values()])]


def step():
    """Steps of train.py on toy clips. "counted": what its --dry-run says of the memory. ValueError
    unless the losses fall."""
    product = products_per_second(DEVICE)
    rows = []
    for variant in VARIANTS:
        with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            options = f"--variant {variant} --text-encoder toy --out {folder} --valid-clips 4"
            lm, config, run, _ = parse_arguments([*options.split(), *SIZES.train.split()])
            used = peak(lambda: train(lm, config, run, Processes(config.device)))  # noqa: B023
            log = [row for row in read_jsonl(run / "log.jsonl") if "loss" in row]
        first, last = (np.mean([row["loss"] for row in part]) for part in (log[:5], log[-5:]))
        if not last < first:
            raise ValueError(f"{variant}: the loss went from {first:.3f} to {last:.3f}")
        took, tokens = np.median([row["seconds"] for row in log]), log[-1]["tokens"]
        flops = 6 * parameters(lm) * tokens
        cells = f"{first:.2f}", f"{last:.2f}", f"{1e3 * took:.0f}", f"{tokens / took:,.0f}"
        cells += f"{flops / took / product:.0%}", used
        rows.append([variant, *cells, f"{sum(memory(lm, config, 0).values()) / 1e9:.2f}"])
    header = ["", "first losses", "last", "ms", "tokens/s", "MFU", "peak GB", "counted GB"]
    return markdown(header, rows)


def open_ours(variant):
    """A model half a minute into a piece -> a step, which returns logits, and bytes of its state"""
    with DEVICE:
        lm = prepare(MusicLM(LMConfig(variant=variant, **SIZES.lm)).eval(), DEVICE)
        text = torch.randn(2, 16, lm.config.d_text)  # two rows, for guidance
        column = torch.zeros(2, 1, dtype=torch.long)
    with precision(lm):
        _, state = lm.prefill(text, text[..., 0] < 9, room=30 * 87)
        run = step_function(lm, column, state)

    def step():
        state.position.fill_(round(30 * FRAME_RATE))
        with precision(lm):
            return run(column)

    return step, sum(v.nbytes for block in state.blocks for layer in block for v in layer or ())


def open_musicgen():
    """The same for MusicGen-small's decoder in transformers: 50 frames per second, 4 codebooks."""
    from transformers import MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    config = MusicgenDecoderConfig(**SIZES.musicgen)
    kind = dict(device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    decoder = MusicgenForCausalLM(config).to(**kind).eval()
    ids = torch.zeros(8, 30 * 50, dtype=torch.long, device=DEVICE)
    text = torch.randn(2, 16, config.hidden_size, **kind)
    read = partial(decoder, encoder_hidden_states=text, use_cache=True)
    cache = read(ids).past_key_values  # keys and values of two rows in each layer
    size = 2 * 2 * ids.shape[1] * config.hidden_size * config.num_hidden_layers * text.itemsize
    step = lambda: read(ids[:, :1], past_key_values=cache).logits[:, -1].view(2, 4, -1)
    return step, size


@torch.inference_mode()
def decode():
    """A step of sampling with guidance, half a minute into a piece."""
    rows = []
    for name in (*VARIANTS, "MusicGen-small"):
        step, size = open_ours(name) if name in VARIANTS else open_musicgen()
        uniform = torch.rand(1, step().shape[1], device=DEVICE)
        took = median_seconds(lambda: sample_tokens(guided(step(), 3), uniform))  # noqa: B023
        rate = 1 / took / (FRAME_RATE if name in VARIANTS else 50)
        rows.append([name, f"{1e3 * took:.2f}", f"{rate:.2f}", f"{size / 1e6:.1f}", peak(step)])
    return markdown(["", "ms", "seconds of audio per second", "state, MB", "peak GB"], rows)


PARTS = {part.__name__: part for part in (ssd, errors, decode, step)}


def gpu():
    """Writes one page, after each part. A part that fails does not stop the others."""
    page = ROOT / "results" / "gpu.md"
    commands = {"tests": ["pytest", "-n", "8", "test_ssd.py", "tests/test_kernel.py"]}
    commands |= {part: ["experiments.bench", part] for part in PARTS}
    text = f"# {torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}\n"
    failed = []
    for title, command in commands.items():
        command = [sys.executable, "-m", *command]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        failed += [title] * (run.returncode != 0)
        text += f"\n## {title}\n\n{run.stdout}\n{run.stderr[-2000:] if run.returncode else ''}"
        page.write_text(text, encoding="utf-8")
    if failed:
        raise ValueError(f"{', '.join(failed)} failed: see {page}")
    return text


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("what", choices=[*PARTS, "gpu"])
    what = parser.parse_args(argv).what
    print(gpu() if what == "gpu" else PARTS[what]())


if __name__ == "__main__":
    entry(main)
