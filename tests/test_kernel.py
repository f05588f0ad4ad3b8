"""The Triton kernels from inside: tilings, dtypes, strides, what PyTorch asks of an operator, and
what the compiled programs need. That they compute the SSD is shown in test_ssd.py."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import tiny

import ssd_kernel
from model import ssd_chunked
from sample import generate
from test_ssd import GPU, KERNEL, cast, compare, inputs, outputs_and_gradients

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(ssd_kernel.triton is None, reason="needs Triton")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
FP16 = KERNEL._replace(dtype=torch.float16, tolerance=2e-3)  # bf16 products: only on a GPU


def test_without_triton_the_module_imports_and_says_what_to_do():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ssd_kernel\n"
        "x = torch.ones(1, 2, 3, 4)\n"
        "assert not ssd_kernel.available(x) and 'not installed' in ssd_kernel.obstacle(x.device)\n"
        "try: ssd_kernel.ssd(x, x[..., 0], x[0, 0, :, 0], x[..., 0], x[..., 0])\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert "needs Triton" in run.stdout and "\n" not in run.stdout.strip(), run.stderr


# ------------------------------------------------------------------------------------------------
# Shapes, tilings, dtypes. In the interpreter fp32 and fp16: its products of bf16 are wrong.

LENGTHS = {"1": 1, "2": 2, "chunk - 1": 15, "chunk": 16, "chunk + 1": 17, "3 chunks + 7": 55}


@pytest.mark.parametrize("way", [KERNEL, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_any_shape(length, with_state, way):
    draw = random.Random(f"{length} {with_state} {way.dtype}")
    N, P = draw.choice([16, 24, 64, 128, 200, 512]), draw.choice([16, 20, 48, 64, 128])
    B, H = draw.choice([(1, 3), (2, 2)]) if N * P < 10_000 else (1, 2)
    args = inputs(draw.randrange(1000), B=B, L=LENGTHS[length], H=H, P=P, N=N)
    args["C"] /= N**0.5
    left_out = ["initial_state"] * (not with_state) + ["D"] * (draw.random() < 0.2)
    args = {k: v for k, v in args.items() if k not in left_out}
    compare(way, args, chunk=16)


@pytest.mark.parametrize("chunk", [32, 100])
def test_a_chunk_of_several_tiles(chunk):
    compare(KERNEL, inputs(7, B=1, L=150, H=2, P=16, N=16), chunk=chunk)


def test_large_tiles_give_the_same(monkeypatch):
    # Those of an H100, whose programs own more frames than they read at a time.
    small = ssd_kernel.configurations
    monkeypatch.setattr(ssd_kernel, "configurations", lambda *a: small(*a[:-2], 232_448, 9))
    compare(FP16._replace(tolerance=3e-3), inputs(7, B=1, L=300, H=1, P=16, N=80))


def test_strided_and_mixed_inputs_as_the_layer_has_them():
    # x, B and C are slices of one tensor, dt of another dtype, and y's gradient is an expanded one.
    xBC = torch.randn(2, 20, 2 * 16 + 2 * 16, device=KERNEL.device).half()
    x, B, C = xBC.split([32, 16, 16], -1)
    dt, A = torch.rand(2, 20, 2, device=KERNEL.device), -torch.rand(2, device=KERNEL.device)
    x = x.unflatten(-1, (2, 16)).requires_grad_()
    y, state = ssd_kernel.ssd(x, dt, A, B.float(), C, chunk=16)
    y.sum().backward()
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    expected, _ = ssd_chunked(x.detach().float(), dt, A, B.float(), C.float())
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_an_unknown_dtype_is_reported_in_one_sentence():
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        ssd_kernel.ssd(**inputs(0, P=16, N=16))


# ------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator


def test_opcheck_of_the_scan():
    args = cast(inputs(5, B=1, L=20, H=2), *KERNEL[1:3])
    good = torch.tensor([20], dtype=torch.int32, device=KERNEL.device)
    torch.library.opcheck(ssd_kernel.ssd_forward, [*args.values(), good, 16])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=on_gpu)])
def test_compile_keeps_one_graph(backend):
    args = cast(inputs(6, L=20, P=16, N=16), *KERNEL[1:3])
    compiled = torch.compile(ssd_kernel.ssd, fullgraph=True, backend=backend)
    expected = outputs_and_gradients(ssd_kernel.ssd, args, chunk=16)
    found = outputs_and_gradients(compiled, args, chunk=16)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["mamba", "cross-simba"])
def test_a_model_on_kernels_is_the_model(variant, monkeypatch):
    lm, encoder = tiny(variant, blocks=1, chunk=32)
    lm.to(KERNEL.device)
    encoder.to(KERNEL.device)
    codes = torch.randint(50, (2, 1, 10), device=KERNEL.device)
    prompts = ["a", "a longer prompt, so that one is padded"]
    results = []
    for available in (lambda x: False, lambda x: True):
        monkeypatch.setattr(ssd_kernel, "available", available)
        text, mask, _ = encoder(prompts)
        loss = lm(codes, text.detach(), mask).float().square().mean()
        gradients = torch.autograd.grad(loss, list(lm.parameters()))
        played = torch.cat(list(generate(lm, encoder, prompts, 2, [1, 2], block=2)), 2)
        results.append([loss, *gradients, played])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1, a.abs().max().item()))


def test_a_model_on_kernels_reads_a_sequence_in_parts(monkeypatch):
    """The first part from zeros, the second from the state, against the whole in PyTorch."""
    lm, encoder = tiny("simba", blocks=1, chunk=32)
    lm.to(KERNEL.device)
    text, mask, _ = encoder.to(KERNEL.device)(["a", "a longer prompt"])
    columns = torch.randint(50, (2, 1, 40), device=KERNEL.device)
    whole, _ = lm.read(columns, text.detach(), mask)
    expected = torch.autograd.grad(whole.square().mean(), list(lm.blocks.parameters()))
    monkeypatch.setattr(ssd_kernel, "available", lambda x: True)
    first, state = lm.read(columns[:, :, :23], text.detach(), mask)
    second, _ = lm.read(columns[:, :, 23:], state=state)
    parts = torch.cat([first, second], 1)
    found = torch.autograd.grad(parts.square().mean(), list(lm.blocks.parameters()))
    for a, b in zip((whole, *expected), (parts, *found)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1, a.abs().max().item()))


# ------------------------------------------------------------------------------------------------
# Compiled, without a GPU. The most shared memory that one program may have, in bytes:

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@pytest.mark.parametrize(
    "arch, dtype, P, N",
    [(arch, "bfloat16", 64, 512) for arch in (80, 86, 89, 90, 100, 120)]
    + [(86, "float32", 64, 128), (86, "float16", 16, 16), (90, "bfloat16", 128, 128)],
)
def test_compiled_kernels_fit_the_card_and_do_not_spill(arch, dtype, P, N):
    command = [sys.executable, "-m", "tests.kernel_resources", *map(str, (arch, dtype, P, N))]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = re.findall(r"(\S+) +(\d+) B +\d+ registers (\d+) spills", run.stdout)
    assert len(lines) == 7, run.stdout
    for name, shared, spills in lines:
        assert int(shared) <= SHARED_MEMORY[arch], name
        assert spills == "0", name


# ------------------------------------------------------------------------------------------------
# On a GPU


@on_gpu
@pytest.mark.parametrize("L, H, P, N", [(600, 3, 64, 512), (257, 2, 128, 64), (900, 4, 16, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_shapes_on_a_gpu(L, H, P, N, dtype):
    args = inputs(L, L=L, H=H, P=P, N=N)
    args["C"] /= N**0.5
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    compare(KERNEL._replace(dtype=dtype, tolerance=tolerance), args)


@on_gpu
def test_beyond_two_billion_numbers():
    # 32-bit offsets would have wrapped round to the beginning.
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    H, P, N, tail = 32, 128, 16, 300
    L = 2**31 // (H * P) + tail
    x = torch.zeros(1, L, H, P, dtype=torch.bfloat16, device="cuda")
    x[:, -tail:] = torch.randn(tail, H, P)
    B, C = torch.randn(2, 1, L, N, dtype=torch.bfloat16, device="cuda")
    dt, A = torch.full((1, L, H), 0.1, device="cuda"), -torch.ones(H, device="cuda")
    y, state = ssd_kernel.ssd(x, dt, A, B, C)
    last = slice(-tail, None)
    expected = ssd_kernel.ssd(x[:, last], dt[:, last], A, B[:, last], C[:, last])
    assert (y[:, last] - expected[0]).norm() <= 1e-2 * expected[0].norm()
    assert (state - expected[1]).norm() <= 1e-2 * expected[1].norm()
