"""How fast it is, measured beside others on this machine.

    python bench.py kernel                 the SSD on a GPU: forward, backward, a step of decoding
    python bench.py kernel --device cpu    the PyTorch form on a CPU
    python bench.py generate               seconds of audio a second, at the paper's size
    python bench.py train                  training steps of the paper's size: tokens a second

Every line of a table is a contender: ours, and those peers that are installed. Repeats are
interleaved (a machine that gets warm slows all of them) and the figures are medians. Above those of
the kernels stands the floor: what the bytes that must move and the products that must be made would
take at the rates of copying and multiplying that this very GPU just showed.

Letters are model.py's: B batch, L length, H heads, P headdim, N d_state, Q chunk.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import ssd_kernel
from audio import FRAME_RATE
from model import VARIANTS, KVCache, LMConfig, Mamba2, MambaState, MusicLM, ssd_chunked
from options import entry
from paper.budget import products_per_second
from sample import _stepper, guided, multiplies_bf16, precision, prepare, sample_tokens

CUDA_SHAPES = {  # (B, L, H, P, N)
    "paper, 30 s": (4, 2600, 32, 64, 512),
    "paper, 10 s": (4, 900, 32, 64, 512),
    "16k frames": (1, 16384, 32, 64, 512),
    "64k frames": (1, 65536, 32, 64, 512),
    "Mamba-2 370M": (4, 2600, 32, 64, 128),
    "Mamba-2 2.7B": (4, 2600, 80, 64, 128),
}
CPU_SHAPES = {"toy": (4, 862, 8, 32, 32), "paper, 30 s": (1, 2600, 32, 64, 512)}


def inputs(shape, device, dtype):
    """x, dt, A, B, C, D of one SSD, as Mamba-2's initialisation makes them."""
    B, L, H, P, N = shape
    g = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=g).to(device, dtype)
    dt = torch.exp(torch.empty(B, L, H).uniform_(math.log(1e-3), math.log(1e-1), generator=g))
    A, D = -torch.empty(H).uniform_(1, 16, generator=g), torch.ones(H)
    b, c = normal(B, L, N), normal(B, L, N) / N**0.5
    args = normal(B, L, H, P), dt.to(device), A.to(device), b, c, D.to(device)
    return [a.requires_grad_() for a in args]


# ------------------------------------------------------------------------------------------------
# The contenders: functions of (x, dt, A, B, C, D, Q) that return y


def ours(x, dt, A, B, C, D, Q):
    return ssd_kernel.ssd(x, dt, A, B, C, D, chunk=Q)[0]


def pytorch(x, dt, A, B, C, D, Q):
    return ssd_chunked(x, dt, A, B, C, D, chunk=Q)[0]


def einsum(x, dt, A, B, C, D, Q):
    """The SSD as its paper's listing 1 writes it: one einsum for each of the four steps."""
    L = x.shape[1]
    chunks = lambda v: F.pad(v, (0, 0) * (v.ndim - 2) + (0, -L % Q)).unflatten(1, (-1, Q))
    u, B, C = chunks(x * dt[..., None]), chunks(B), chunks(C)
    a = chunks(dt * A).permute(0, 3, 1, 2).cumsum(-1)  # (B, H, c, Q)
    within = _decays(a)  # (B, H, c, Q, Q)
    y = torch.einsum("bcin,bcjn,bhcij,bcjhp->bcihp", C, B, within, u)
    states = torch.einsum("bcjn,bhcj,bcjhp->bchpn", B, torch.exp(a[..., -1:] - a), u)
    between = _decays(F.pad(a[..., -1].cumsum(-1), (1, 0)))[:, :, :-1, 1:]  # (B, H, c, c)
    entering = torch.einsum("bhdc,bchpn->bdhpn", between, states)
    y = y + torch.einsum("bcin,bchpn,bhci->bcihp", C, entering, torch.exp(a))
    return y.flatten(1, 2)[:, :L] + D[:, None] * x


def _decays(a):
    """exp(a_i - a_j) for j <= i, else 0."""
    size = a.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=a.device).triu(1)
    return (a[..., :, None] - a[..., None, :]).masked_fill(future, -torch.inf).exp()


def from_transformers():
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return lambda x, dt, A, B, C, D, Q: mamba2_chunk_scan(
        x, dt, A, B[:, :, None], C[:, :, None], Q, D=D
    )


def from_mamba_ssm():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda x, dt, A, B, C, D, Q: mamba_chunk_scan_combined(
        x, dt, A, B[:, :, None], C[:, :, None], chunk_size=Q, D=D
    )


def from_fla():
    from fla.ops.simple_gla import chunk_simple_gla

    def scan(x, dt, A, B, C, D, Q):
        k, q = (v[:, :, None].expand(-1, -1, x.shape[2], -1).contiguous() for v in (B, C))
        u = x * dt[..., None].to(x.dtype)
        y, _ = chunk_simple_gla(q, k, u, g=dt * A, scale=1.0)
        return y + D[:, None].to(x.dtype) * x

    return scan


def reason(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def installed(peers):
    """Those of {name: function that imports it} which import; the reason why not, for the rest."""
    found = {}
    for name, load in peers.items():
        try:
            found[name] = load()
        except Exception as error:  # a broken installation raises what it likes
            print(f"without {name}: {reason(error)}")
    return found


# ------------------------------------------------------------------------------------------------
# On a GPU


def floor(shape, Q):
    """(bytes, FLOPs) of the chunked algorithm in bf16, forward and backward.

    Bytes: each operand once, and the chunks' states once out and once in. FLOPs: products of a
    chunk with the states (forward two: into them and out of them; backward four), of the pairs of
    frames of a chunk with x or dy (one and two), and those pairs themselves, C . B^T (one and two).
    """
    B, L, H, P, N = shape
    x, bc, states = 2 * B * L * H * P, 2 * B * L * N, 2 * B * math.ceil(L / Q) * H * P * N
    state, pairs, cb = 2 * B * L * H * P * N, B * L * Q * H * P, B * L * Q * N
    forward = 2 * x + 2 * bc + 2 * states, 2 * state + pairs + cb
    return forward, (3 * x + 4 * bc + 3 * states, 4 * state + 2 * pairs + 2 * cb)


def device_rates():
    """Bytes a second of a copy and FLOPs a second of a bf16 matrix product, measured."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy = median(events(lambda: b.copy_(a))[0] for _ in range(20))
    product = median(events(lambda: m @ m)[0] for _ in range(20))
    return 2 * a.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


def events(*actions):
    """Milliseconds that each of some actions takes on the device, one after the other."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(actions) + 1)]
    marks[0].record()
    for action, mark in zip(actions, marks[1:]):
        action()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def scan_on_cuda(name, shape, Q, repeats, rates):
    contenders = {"ours": ours, "PyTorch": pytorch}
    contenders |= installed({"mamba_ssm": from_mamba_ssm, "fla": from_fla})
    args = inputs(shape, "cuda", torch.bfloat16)
    dy = torch.randn_like(args[0])
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any L2 holds
    times, first, peak, y = {}, {}, {}, {}

    def once(contender):
        def forward():
            y[0] = contenders[contender](*args, Q)

        flush.zero_()
        result = events(forward, lambda: torch.autograd.grad(y[0], args, dy.view_as(y[0])))
        y.clear()
        return result

    for contender in list(contenders):
        start = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            once(contender)
        except Exception as error:  # out of memory, or a shape that it has no kernel for
            print(f"without {contender}: {reason(error)}")
            del contenders[contender]
            continue
        first[contender] = time.perf_counter() - start
        peak[contender] = (torch.cuda.max_memory_allocated() - before) / 2**20
        times[contender] = []
    for _ in range(repeats):
        for contender in contenders:
            times[contender].append(once(contender))

    print(f"\n{name}: B {shape[0]} L {shape[1]} H {shape[2]} P {shape[3]} N {shape[4]}, chunk {Q}")
    print(f"{'':12}{'forward':>10}{'backward':>10}{'both ms':>10}{'peak MB':>10}{'first s':>10}")
    least = [max(b / rates[0], f / rates[1]) * 1e3 for b, f in floor(shape, Q)]
    print(f"{'floor':12}{least[0]:10.3f}{least[1]:10.3f}{sum(least):10.3f}")
    for contender, each in times.items():
        forward, backward = (median(t) for t in zip(*each))
        print(
            f"{contender:12}{forward:10.3f}{backward:10.3f}{median(map(sum, each)):10.3f}"
            f"{peak[contender]:10.0f}{first[contender]:10.1f}"
        )


def step_on_cuda(batch, repeats, rates):
    """A step of the paper's layer between its projections, replayed as a CUDA graph."""
    layer = Mamba2(LMConfig()).cuda().requires_grad_(False)
    H, N = layer.D.numel(), layer.d_state
    zxBCdt = torch.randn(batch, sum(layer.sizes), device="cuda")
    state = MambaState(
        torch.zeros(batch, layer.conv1d.kernel_size[0] - 1, layer.sizes[1], device="cuda"),
        torch.zeros(batch, H, layer.headdim, N, device="cuda"),
    )
    layer.in_proj, layer.out_proj = nn.Identity(), nn.Identity()
    weights = layer.conv1d.weight[:, 0], layer.conv1d.bias, layer.dt_bias, layer.A_log, layer.D
    contenders = {
        "ours": lambda: ssd_kernel.step(
            zxBCdt, *state, *weights, layer.norm.weight, layer.norm.eps
        ),
        "PyTorch": lambda: layer.step(zxBCdt, state, None),
    }
    contenders |= installed({"mamba_ssm*": lambda: mamba_ssm_step(layer, zxBCdt, state)})
    graphs = {}
    for contender, run in contenders.items():
        run()
        torch.cuda.synchronize()
        graphs[contender] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[contender]):
            for _ in range(20):
                run()
    times = {contender: [] for contender in graphs}
    for _ in range(repeats):
        for contender, graph in graphs.items():
            times[contender].append(events(graph.replay)[0] / 20 * 1e3)
    moved = 2 * state.ssm.numel() * state.ssm.element_size()
    print(f"\nstep: {batch} sequences, H {H} P {layer.headdim} N {N}, state {moved / 2e6:.1f} MB")
    print(f"{'floor':12}{moved / rates[0] * 1e6:10.1f} us")
    for contender, each in times.items():
        print(f"{contender:12}{median(each):10.1f} us{moved / median(each) / 1e3:10.0f} GB/s")
    if "mamba_ssm*" in times:
        print("* the state's update alone, without convolution, gate and norm")


def mamba_ssm_step(layer, zxBCdt, state):
    """The update of the state alone: mamba_ssm has the rest of a step in kernels of their own."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    batch, H, P, N = state.ssm.shape
    _, xBC, dt = zxBCdt.split(layer.sizes, -1)
    x, B, C = xBC.split([H * P, N, N], -1)
    A = -torch.exp(layer.A_log)[:, None, None].expand(H, P, N)
    dt, bias, D = (v[..., None].expand(*v.shape, P) for v in (dt, layer.dt_bias, layer.D))
    x, B, C = x.unflatten(-1, (H, P)), B[:, None], C[:, None]
    return lambda: selective_state_update(
        state.ssm, x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True
    )


# ------------------------------------------------------------------------------------------------
# On a CPU: every contender in a process of its own, which alone knows its peak of memory


def in_child(command, job):
    """What a child of this program prints as JSON; None, and a line that says why, if it fails."""
    job = [sys.executable, __file__, command, *map(str, job)]
    run = subprocess.run(job, capture_output=True, text=True)
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    last = (run.stderr.splitlines() or [f"exit {run.returncode}"])[-1]
    print(f"without {job[job.index('--child') + 1]}: {last[:100]}")


def in_turn(command, jobs, rounds):
    """Every job {key: arguments} of a command in a child of its own, one after the other, `rounds`
    times -> {key: what its children printed}, without the jobs that failed."""
    found = {key: [] for key in jobs}
    for _ in range(rounds):
        for key in list(found):
            if (result := in_child(command, jobs[key])) is None:
                del found[key]
            else:
                found[key].append(result)
    return found


def peak_megabytes(device):
    """The most memory that this process has had."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


CPU_CONTENDERS = {
    "ours": lambda: pytorch,
    "transformers": from_transformers,
    "einsum": lambda: einsum,
}


def child(contender, shape, Q, repeats):
    """Runs in the child: seconds of each forward + backward, and the memory it took, as JSON."""
    # Every child imports all of them and wakes PyTorch up, so that the memory before is the same.
    f, small = installed(CPU_CONTENDERS)[contender], inputs((1, 2, 1, 2, 2), "cpu", torch.float32)
    torch.autograd.grad(f(*small, 2).sum(), small)
    args = inputs(shape, "cpu", torch.float32)
    dy, times = torch.randn(*args[0].shape), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(repeats + 1):  # the first is for warming up
        start = time.perf_counter()
        torch.autograd.grad(f(*args, Q), args, dy)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(dict(times=times[1:], megabytes=peak / 1024)))


def scan_on_cpu(name, shape, chunks, repeats):
    print(f"\n{name}: B {shape[0]} L {shape[1]} H {shape[2]} P {shape[3]} N {shape[4]}, fp32")
    print(f"{'':14}{'chunk':>6}{'forward + backward':>21}{'peak MB':>10}")
    size = ["--repeats", repeats, "--shape", ",".join(map(str, shape))]
    found = in_turn(
        "kernel",
        {(c, Q): ["--child", c, "--chunk", Q, *size] for Q in chunks for c in CPU_CONTENDERS},
        rounds=3,
    )
    for (contender, Q), runs in found.items():
        seconds = median(t for run in runs for t in run["times"])
        megabytes = median(run["megabytes"] for run in runs)
        print(f"{contender:14}{Q:6}{seconds * 1e3:18.1f} ms{megabytes:10.0f}")


def kernel(args):
    if args.child:
        return child(args.child, args.shape, args.chunk[0], args.repeats or 3)
    given = {"given": args.shape} if args.shape else None
    if args.device == "cpu":
        for name, shape in (given or CPU_SHAPES).items():
            scan_on_cpu(name, shape, args.chunk or [64, 256], args.repeats or 3)
        return
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; try --device cpu")
    rates = device_rates()
    print(f"{torch.cuda.get_device_name()}: copies {rates[0] / 1e9:.0f} GB/s, multiplies bf16 at")
    print(f"{rates[1] / 1e12:.0f} TFLOP/s; torch {torch.__version__}")
    for name, shape in (given or CUDA_SHAPES).items():
        for Q in args.chunk or [256]:
            scan_on_cuda(name, shape, Q, args.repeats or 20, rates)
    for batch in (2, 16):
        step_on_cuda(batch, args.repeats or 20, rates)


# ------------------------------------------------------------------------------------------------
# Generating: a language model of the paper's size, its weights random, writes first-codebook tokens
# with guidance, so two rows a sample. No contender's step needs the music to be real: it is put at
# the beginning, the middle and the end of a piece, with a state or a cache as large as it would be
# there, and makes a few steps. Their times, integrated by Simpson's rule, are the whole piece's.

TEXT = 16  # tokens of a prompt
MUSICGEN_RATE = 50  # frames a second


def paper_size(variant, device):
    torch.manual_seed(0)
    with torch.device(device):
        lm = MusicLM(LMConfig(variant=variant)).eval()
    return prepare(lm, device)


def open_ours(variant, batch, room, device):
    """-> at(position): step(), and the bytes that a step at a position must read and write. room:
    the positions that any step will come to"""
    lm = paper_size(variant, device)
    weights = sum(p.nbytes for p in lm.blocks.parameters())
    weights += sum(p.nbytes for p in lm.heads.parameters())
    text = torch.randn(1, TEXT, 768, device=device).expand(2 * batch, -1, -1)
    mask = torch.ones(2 * batch, TEXT, dtype=torch.bool, device=device)

    def at(position):
        with precision(lm):
            logits, state = lm.prefill(text, mask, room=room)
        state.position.add_(position)  # what the caches hold there is zeros, and takes as long
        run = None
        of = lambda kind: (v for block in state.blocks for s in block if type(s) is kind for v in s)
        fixed, grown = (sum(v.nbytes for v in of(kind)) for kind in (MambaState, KVCache))

        def step():
            nonlocal logits, run
            mixed = guided(logits, 3)
            column = sample_tokens(mixed, torch.rand(batch, 1, device=device))
            column = torch.cat([column, column])
            with precision(lm):
                run = run or _stepper(lm, column, state)
                logits = run(column)

        return step, weights + 2 * fixed + grown

    return at


def open_rereading(variant, batch, room, device):
    """As the authors' code does: all that there is so far, read anew for every token."""
    lm = paper_size(variant, device)
    weights = sum(p.nbytes for p in lm.parameters())
    text = torch.randn(2 * batch, TEXT, 768, device=device)
    mask = torch.ones(2 * batch, TEXT, dtype=torch.bool, device=device)

    def at(position):
        codes = torch.randint(1024, (2 * batch, 1, position + 1), device=device)

        def step():
            with precision(lm):
                logits = lm(codes, text, mask)[:, :, -1]
            sample_tokens(guided(logits, 3), torch.rand(batch, 1, device=device))

        return step, weights

    return at


def open_musicgen(dtype, batch, room, device):
    """MusicGen-small's decoder in transformers: 50 frames a second, four codebooks a step."""
    from transformers import DynamicCache, EncoderDecoderCache, MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    torch.manual_seed(0)
    config = MusicgenDecoderConfig(use_cache=True)  # the defaults are MusicGen-small's
    decoder = MusicgenForCausalLM(config).to(device, dtype).eval()
    weights = sum(p.nbytes for p in decoder.parameters())
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    text = torch.randn(2 * batch, TEXT, config.hidden_size, device=device, dtype=dtype)

    def at(position):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        grown = 0
        if position:
            for i in range(config.num_hidden_layers):
                kv = torch.zeros(2, 2 * batch, heads, position, width, device=device, dtype=dtype)
                cache.self_attention_cache.update(*kv, i)
                grown += kv.nbytes
        ids = torch.zeros(2 * batch * config.num_codebooks, 1, dtype=torch.long, device=device)

        def step():
            nonlocal ids
            logits = decoder(
                ids, encoder_hidden_states=text, past_key_values=cache, use_cache=True
            ).logits[:, -1].view(2 * batch, config.num_codebooks, -1)  # fmt: skip
            mixed = guided(logits, 3)
            tokens = sample_tokens(
                mixed, torch.rand(batch, config.num_codebooks, device=device), temperature=1.0
            )
            ids = torch.cat([tokens, tokens]).view(-1, 1)

        return step, weights + grown

    return at


GENERATORS = {  # name: (how it is opened, frames a second)
    **{v: (lambda *size, v=v: open_ours(v, *size), FRAME_RATE) for v in VARIANTS},
    "MusicGen-small": (lambda *size: open_musicgen(torch.float32, *size), MUSICGEN_RATE),
    "MusicGen, bf16": (lambda *size: open_musicgen(torch.bfloat16, *size), MUSICGEN_RATE),
    "simba, re-read": (lambda *size: open_rereading("simba", *size), FRAME_RATE),
}


def generate_child(name, batch, seconds, steps, device):
    """Runs in the child: milliseconds and bytes of a step at three places, the peak, as JSON."""
    opened, rate = GENERATORS[name]
    frames = round(seconds * rate)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    places, moved = [], []
    with torch.inference_mode():
        at = opened(batch, frames + 1 + steps, device)
        for position in (0, frames // 2, frames):
            step, size = at(position)
            count = 1 if "re-read" in name and position else steps
            step()  # the first is for warming up
            wait()
            begun = time.perf_counter()
            for _ in range(count):
                step()
            wait()
            places.append((time.perf_counter() - begun) / count * 1e3)
            moved.append(size)
    print(json.dumps(dict(ms=places, moved=moved, megabytes=peak_megabytes(device), frames=frames)))


def simpson(values):
    return (values[0] + 4 * values[1] + values[2]) / 6


def generate(args):
    """How fast the language models of the paper's size write."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.child:
        return generate_child(args.child, args.batch[0], args.seconds[0], args.steps, device)
    print(f"paper size, random weights, guidance, {device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    for seconds in args.seconds:
        for batch in args.batch:
            print(f"\n{seconds:g} s of audio, batch {batch}")
            print(f"{'':16}{'ms a step, begin':>18}{'end':>9}{'audio s / s':>13}{'GB/s':>7}"
                  f"{'peak MB':>9}")  # fmt: skip
            job = ["--batch", batch, "--seconds", seconds, "--device", device]
            job += ["--steps", args.steps]
            jobs = {name: ["--child", name, *job] for name in args.only or GENERATORS}
            found = in_turn("generate", jobs, args.rounds)
            for name, runs in found.items():
                ms = [median(times) for times in zip(*(run["ms"] for run in runs))]
                whole = simpson(ms) * runs[0]["frames"] / 1e3
                rate = simpson(runs[0]["moved"]) / simpson(ms) / 1e6
                print(f"{name:16}{ms[0]:18.2f}{ms[2]:9.2f}{batch * seconds / whole:13.4f}"
                      f"{rate:7.1f}{median(run['megabytes'] for run in runs):9.0f}")  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Training: a step of the paper's size, on random tokens, without the text encoder


class TheirMamba2(nn.Module):
    """mamba_ssm's Mamba-2 in the place of ours: the block of the authors' code."""

    def __init__(self, config):
        super().__init__()
        from mamba_ssm import Mamba2 as Theirs

        sizes = dict(d_state=config.d_state, headdim=config.headdim, expand=config.expand)
        self.mamba = Theirs(config.d_model, **sizes)

    def forward(self, h, context):
        return self.mamba(h), None


def trained(name):
    """-> the language model of a contender"""
    lm = MusicLM(LMConfig(variant=name.removesuffix(", mamba_ssm")))
    if name.endswith(", mamba_ssm"):
        for block in lm.blocks:
            for i, layer in enumerate(block.layers):
                if isinstance(layer, Mamba2):
                    block.layers[i] = TheirMamba2(lm.config)
    return lm


TRAINED = [*VARIANTS, "simba, mamba_ssm"]


def train_child(name, batch, seconds, steps, device, compiled, recompute):
    """Runs in the child: seconds of each step, parameters and the peak, as JSON."""
    torch.manual_seed(0)
    lm = trained(name).to(device).train()
    lm.recompute = recompute
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-4, fused=True)
    run = torch.compile(lm, dynamic=False) if compiled else lm
    frames, times = round(seconds * FRAME_RATE), []
    codes = torch.randint(1024, (batch, 1, frames), device=device)
    text = torch.randn(batch, 64, 768, device=device)
    mask = torch.ones(batch, 64, dtype=torch.bool, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(steps + 2):  # two for compiling and for warming up
        wait()
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, multiplies_bf16(torch.device(device))):
            logits = run(codes, text, mask)
        F.cross_entropy(logits.float().flatten(0, 2), codes.flatten()).backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append(time.perf_counter() - begun)
    count = sum(p.numel() for p in lm.parameters())
    print(json.dumps(dict(times=times[2:], parameters=count, megabytes=peak_megabytes(device))))


def train(args):
    """Tokens a second, share of the device's rate, and memory of the paper's training step."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch, seconds = args.batch[0], args.seconds[0]
    options = args.steps, device, not args.no_compile, args.recompute
    if args.child:
        return train_child(args.child, batch, seconds, *options)
    rate = products_per_second(torch.device(device))
    print(f"{batch} x {seconds:g} s, {device}, torch {torch.__version__}; products at "
          f"{rate / 1e12:.2f} TFLOP/s; MFU: 6 x parameters x tokens, of that")  # fmt: skip
    print(f"{'':18}{'ms a step':>11}{'tokens / s':>12}{'MFU':>7}{'peak MB':>9}")
    job = ["--batch", batch, "--seconds", seconds, "--device", device, "--steps", args.steps]
    job += ["--recompute", args.recompute, *["--no-compile"] * args.no_compile]
    jobs = {name: ["--child", name, *job] for name in args.only or TRAINED}
    found = in_turn("train", jobs, args.rounds)
    tokens = batch * round(seconds * FRAME_RATE)
    for name, runs in found.items():
        step = median(t for run in runs for t in run["times"])
        share = 6 * runs[0]["parameters"] * tokens / step / rate
        print(f"{name:18}{step * 1e3:11.1f}{tokens / step:12,.0f}{share:7.1%}"
              f"{median(run['megabytes'] for run in runs):9.0f}")  # fmt: skip


def shape_of(text):
    shape = tuple(map(int, text.split(",")))
    if len(shape) != 5:
        raise argparse.ArgumentTypeError("expected five numbers, B,L,H,P,N")
    return shape


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("kernel", help="the SSD: forward, backward, step")
    command.set_defaults(run=kernel)
    command.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    command.add_argument("--shape", type=shape_of, help="B,L,H,P,N instead of those built in")
    command.add_argument("--chunk", type=int, nargs="+", help="[256; on a CPU 64 and 256]")
    command.add_argument("--repeats", type=int, help="[20; on a CPU 3 in each of 3 processes]")
    command.add_argument("--child", choices=list(CPU_CONTENDERS), help=argparse.SUPPRESS)
    command = commands.add_parser("generate", help=generate.__doc__)
    command.set_defaults(run=generate)
    command.add_argument("--device", choices=["cuda", "cpu"], help="[cuda where there is one]")
    command.add_argument("--seconds", type=float, nargs="+", default=[10, 30], help="[10 30]")
    command.add_argument("--batch", type=int, nargs="+", default=[1], help="samples at once [1]")
    command.add_argument("--steps", type=int, default=12, help="timed at each of 3 places [12]")
    command.add_argument("--rounds", type=int, default=3, help="of all contenders in turn [3]")
    command.add_argument("--only", nargs="+", choices=list(GENERATORS), help="[all of them]")
    command.add_argument("--child", choices=list(GENERATORS), help=argparse.SUPPRESS)
    command = commands.add_parser("train", help=train.__doc__)
    command.set_defaults(run=train)
    command.add_argument("--device", choices=["cuda", "cpu"], help="[cuda where there is one]")
    command.add_argument("--seconds", type=float, nargs=1, default=[30], help="of a clip [30]")
    command.add_argument("--batch", type=int, nargs=1, default=[4], help="clips [4]")
    command.add_argument("--steps", type=int, default=10, help="timed [10]")
    command.add_argument("--rounds", type=int, default=2, help="of all contenders in turn [2]")
    command.add_argument("--recompute", type=int, default=6, help="blocks, as in train.py [6]")
    command.add_argument("--no-compile", action="store_true", help="without torch.compile")
    command.add_argument("--only", nargs="+", choices=TRAINED, help="[all of them]")
    command.add_argument("--child", choices=TRAINED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    entry(main)
