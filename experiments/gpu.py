"""All that a GPU is needed for, on one page: `python -m experiments.bench gpu` (see bench.py).

In under ten minutes: the kernels' tests, the benchmarks, the errors of the SSD, and a training run
whose loss must fall. --rehearse runs all of it on a CPU, at small sizes.
"""

import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import ssd_kernel
from data import Clips
from experiments import bench
from experiments.bench import DEVICE, GPU
from model import ssd_chunked, ssd_recurrent
from toy import corpus

ROOT = Path(__file__).parents[1]


def page(sizes):
    """The page. It is written after every part, and a part that fails does not stop the others."""
    file = ROOT / sizes.page
    file.parent.mkdir(exist_ok=True)
    text = f"# {torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}\n"
    failed = []
    for part in (tests, bench.ssd, errors, learn, bench.decode, bench.step):
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


def tests(sizes):
    """The tests of the kernels, which on a GPU run there."""
    command = [sys.executable, "-m", "pytest", "-n", "8", "test_ssd.py", "tests/test_kernel.py"]
    command += sizes.tests
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    if run.returncode:
        raise ValueError(run.stdout[-2000:])
    return run.stdout.splitlines()[-1]


def errors(sizes):
    """Relative errors of the SSD, in norm, against the loop in float64 from the same inputs."""
    ways = [
        ("PyTorch", ssd_chunked, None),
        ("kernels", ssd_kernel.ssd, None),
        ("kernels, fp32 states", ssd_kernel.ssd, torch.float32),
    ]
    short, long = sizes.lengths
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        interpretable = dtype != torch.bfloat16  # the interpreter's products of bf16 are wrong
        kernels = bench.RUNS_KERNELS and (GPU or interpretable)
        for L, decay in [(short, 1.0), (long, 1.0), (short, 0.01), (short, 100.0)]:
            args = bench.inputs((1, L, *sizes.errors), dtype, decay)
            exact = {name: v.detach().double().requires_grad_() for name, v in args.items()}
            expected = outputs_and_gradients(ssd_recurrent, exact)
            for name, function, state_dtype in ways if kernels else ways[:1]:
                if state_dtype == dtype:
                    continue
                with mock.patch.object(ssd_kernel, "STATE_DTYPE", state_dtype):
                    found = outputs_and_gradients(function, args, chunk=64)
                cells = [(a.double() - b).norm() / b.norm() for a, b in zip(found, expected)]
                rows.append([str(dtype)[6:], L, decay, name, *(f"{cell:.1e}" for cell in cells)])
    header = ["dtype", "L", "dt times", "", "y", "state", *("d" + name for name in args)]
    return bench.table(header, rows)


def outputs_and_gradients(function, args, **options):
    y, state = function(**args, **options)
    g = torch.Generator().manual_seed(0)
    loss = sum((v * torch.randn(v.shape, generator=g).to(DEVICE)).sum() for v in (y, state))
    return [y, state, *torch.autograd.grad(loss, [*args.values()])]


def learn(sizes):
    """Simba trains on toy clips. ValueError unless its loss falls, as with the SSD in PyTorch."""
    clips = Clips(corpus.folder(), "train", 1)
    size = sizes.batch, min(862, sizes.frames)

    def losses(steps):
        train = bench.trainer(bench.language_model(sizes, "simba"), sizes.batch)
        batches = (clips.batch(i * size[0], *size, 0, lambda *_: "")[0] for i in range(steps))
        return [train(torch.as_tensor(codes).to(DEVICE)) for codes in batches]

    found = losses(sizes.steps)
    with mock.patch.object(ssd_kernel, "available", lambda x: False):
        apart = max(abs(a - b) for a, b in zip(found, losses(10)))
    first, last = (sum(part) / 10 for part in (found[:10], found[-10:]))
    text = f"Loss of the first ten of {sizes.steps} steps {first:.3f}, of the last ten {last:.3f}; "
    text += f"with the SSD in PyTorch the first ten are at most {apart:.4f} apart."
    if not last < first or apart > 0.2:
        raise ValueError(text)
    return text
