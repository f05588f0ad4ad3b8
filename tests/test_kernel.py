"""The Triton kernels. On a CPU they run in Triton's interpreter, which has to be chosen before
Triton is imported: `test_everything_in_the_interpreter` runs this file once more, in a process of
its own. Compiling them needs no GPU either, and is done for four cards."""

import importlib.util
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
from model import Context, LMConfig, Mamba2, MambaState, ssd_chunked, ssd_recurrent
from sample import generate
from test_ssd import inputs, outputs_and_gradients

HERE = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
has_triton = importlib.util.find_spec("triton") is not None
outside = pytest.mark.skipif(INTERPRETED or not has_triton, reason="needs Triton's compiler")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
on_cuda = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "test_ssd.py",
        "tests/test_kernel.py",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=HERE, env=env, **pipes)
    yield process
    process.kill()


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
# In the interpreter: fp32 and fp16 (its bf16 products are wrong), tiny chunks


def compare(args, dtype=torch.float32, tolerance=1e-5, device="cpu", without=(), **options):
    """Outputs and all gradients against the recurrence in float64, on the same rounded inputs."""
    optional = [name for name in ("D", "initial_state") if name not in without]
    given = [
        a for name, a in zip("x dt A B C D initial_state".split(), args) if name not in without
    ]
    # x, B and C are of dtype; what decides about the decays, and the state, is fp32.
    low = [a.detach().to(device, dtype if i in (0, 3, 4) else None) for i, a in enumerate(given)]
    low = [a.float() if a.dtype == torch.float64 else a for a in low]
    high = [a.double() for a in low]
    result = lambda f, values, **options: outputs_and_gradients(
        lambda *a: f(*a[:5], **dict(zip(optional, a[5:])), **options),
        [a.requires_grad_() for a in values],
    )
    names = ["y", "final state", "dx", "ddt", "dA", "dB", "dC", *optional]
    found = result(ssd_kernel.ssd, low, **options)
    for name, e, v in zip(names, result(ssd_recurrent, high), found):
        assert v.isfinite().all(), name
        error = (e - v).norm() / (e.norm() + 0.1)
        assert error <= tolerance * (5 if name == "dA" else 1), f"{name}: {error:.1e}"


LENGTHS = {"1": 1, "2": 2, "chunk - 1": 15, "chunk": 16, "chunk + 1": 17, "3 chunks + 7": 55}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_equal_the_recurrence_with_all_gradients(length, with_state, dtype):
    draw = random.Random(f"{length} {with_state} {dtype}")
    N, P = draw.choice([16, 24, 64, 128, 200, 512]), draw.choice([16, 20, 48, 64, 128])
    B, H = draw.choice([(1, 3), (2, 2)]) if N * P < 10_000 else (1, 2)
    args = inputs(draw.randrange(1000), B=B, L=LENGTHS[length], H=H, P=P, N=N)
    args[4] = args[4].detach() / N**0.5
    without = ["initial_state"] * (not with_state) + ["D"] * (draw.random() < 0.2)
    compare(args, dtype, 1e-5 if dtype == torch.float32 else 2e-3, without=without, chunk=16)


@interpreted
@pytest.mark.parametrize("chunk", [1, 32, 100, 128])
def test_any_chunk_gives_the_same(chunk):
    compare(inputs(7, B=1, L=150, H=2, P=16, N=16), chunk=chunk)


@interpreted
def test_large_tiles_give_the_same(monkeypatch):
    # Those of an H100, whose programs own more frames than they look at in one go.
    small = ssd_kernel.configurations
    monkeypatch.setattr(ssd_kernel, "configurations", lambda *a: small(*a[:-1], 232_448))
    compare(inputs(7, B=1, L=300, H=1, P=16, N=80), torch.float16, 3e-3)


@interpreted
def test_kept_states_give_the_same_gradients(monkeypatch):
    monkeypatch.setattr(ssd_kernel, "KEEP_STATES", True)
    compare(inputs(8, L=40, P=16, N=16), chunk=16)


@interpreted
@pytest.mark.parametrize("decay", [1e-3, 50.0, 1e4])
def test_strong_and_weak_decays_stay_finite_and_right(decay):
    # As for ssd_chunked: a sum of strong decays is in the thousands and stands in an exponent.
    args = inputs(4, L=70, P=16, N=16, decay=decay)
    compare(args, tolerance=1e-3 if decay > 1 else 2e-5, chunk=32)


@interpreted
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_y_alone_and_of_the_final_state_alone(used):
    args = [a.detach().float().requires_grad_() for a in inputs(9, L=33, P=16, N=16)]
    fast = ssd_kernel.ssd(*args, chunk=16)[used].square().sum()
    slow = ssd_chunked(*args, chunk=16)[used].square().sum()
    for a, b in zip(*(torch.autograd.grad(v, args, materialize_grads=True) for v in (slow, fast))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


@interpreted
def test_the_future_does_not_reach_the_past():
    args = [a.detach().float().requires_grad_() for a in inputs(2, P=16, N=16)]
    y, _ = ssd_kernel.ssd(*args, chunk=16)
    x, dt, _, B, C, *_ = args
    for g in torch.autograd.grad(y[:, 20].sum(), [x, dt, B, C]):
        assert g[:, 21:].abs().max() == 0 and g[:, :21].abs().max() > 0


@interpreted
@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_sequence_cut_in_two_and_chained_is_the_sequence(cut):
    x, dt, A, B, C, D, state = (v.detach().float() for v in inputs(1, P=16, N=16))
    whole = ssd_kernel.ssd(x, dt, A, B, C, D, state, chunk=16)
    ys = []
    for part in (slice(cut), slice(cut, None)):
        y, state = ssd_kernel.ssd(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state, chunk=16
        )
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, whole[1], rtol=1e-4, atol=1e-4)


@interpreted
def test_packed_sequences_do_not_see_each_other_when_the_state_is_forgotten_between():
    x, dt, A, B, C, D, _ = (v.detach().float() for v in inputs(3, P=16, N=16))
    x[:, 20], dt[:, 20] = 0, 1e4
    y, _ = ssd_kernel.ssd(x, dt, A, B, C, D, chunk=16)
    alone, _ = ssd_kernel.ssd(x[:, 21:], dt[:, 21:], A, B[:, 21:], C[:, 21:], D, chunk=16)
    torch.testing.assert_close(y[:, 21:], alone, rtol=1e-3, atol=1e-3)


@interpreted
def test_strided_and_mixed_inputs_as_the_layer_has_them():
    # x, B and C are slices of one tensor, dt of another dtype, and y's gradient is an expanded one.
    xBC = torch.randn(2, 20, 2 * 16 + 2 * 16).half()
    x, B, C = xBC.split([32, 16, 16], -1)
    dt, A = torch.rand(2, 20, 2), -torch.rand(2)
    x = x.unflatten(-1, (2, 16)).requires_grad_()
    y, state = ssd_kernel.ssd(x, dt, A, B.float(), C, chunk=16)
    y.sum().backward()
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    expected, _ = ssd_chunked(x.detach().float(), dt, A, B.float(), C.float())
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


@interpreted
def test_an_unknown_dtype_is_told_in_one_sentence():
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        ssd_kernel.ssd(*inputs(0, P=16, N=16))


# ------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator


def operator_arguments():
    x, dt, A, B, C, D, state = (v.detach().float() for v in inputs(5, B=1, L=20, P=16, N=16, H=2))
    a = torch.randn(1, 2, 2, 16).abs().neg().cumsum(-1)
    B, C = torch.randn(2, 1, 2, 16, 16)
    return [v.requires_grad_() for v in (x, a.detach().exp(), a, B, C, D, state)]


@interpreted
def test_opcheck():
    torch.library.opcheck(ssd_kernel.ssd_forward, operator_arguments())
    layer, h, state = a_layer()
    torch.library.opcheck(ssd_kernel.step, step_arguments(layer, h, state))


@interpreted
def test_compile_keeps_one_graph():
    args = [a.detach().float().requires_grad_() for a in inputs(6, L=20, P=16, N=16)]
    f = lambda *a: ssd_kernel.ssd(*a, chunk=16)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(f, args), outputs_and_gradients(compiled, args)):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------
# One step of decoding


def a_layer(P=20, N=24, device="cpu"):
    torch.manual_seed(0)
    layer = Mamba2(LMConfig(d_model=40, d_state=N, headdim=P)).to(device)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
        layer.D.uniform_(0.5, 2)
        _, state = layer(torch.randn(3, 7, 40, device=device), Context(None, None, None))
    return layer, torch.randn(3, 40, device=device), state


def step_arguments(layer, h, state):
    weights = layer.conv1d.weight[:, 0], layer.conv1d.bias, layer.dt_bias, layer.A_log, layer.D
    args = layer.in_proj(h), *state, *weights, layer.norm.weight
    return [a.detach() for a in args] + [layer.norm.eps]


def check_steps(device):
    layer, _, state = a_layer(device=device)
    expected_state = MambaState(*(v.clone() for v in state))
    with torch.no_grad():
        for _ in range(5):
            h = torch.randn(3, 40, device=device)
            expected = layer.step(h, expected_state, None)
            y = layer.out_proj(ssd_kernel.step(*step_arguments(layer, h, state)))
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            for a, b in zip(state, expected_state):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@interpreted
def test_step_is_the_layers_step():
    check_steps("cpu")


@interpreted
@pytest.mark.parametrize("variant", ["mamba", "cross-simba"])
def test_a_model_on_kernels_is_the_model(variant, monkeypatch):
    lm, encoder = tiny(variant)
    codes, prompts = torch.randint(50, (2, 1, 20)), ["a", "a longer prompt, so that one is padded"]
    results = []
    for available in (ssd_kernel.available, lambda x: True):
        monkeypatch.setattr(ssd_kernel, "available", available)
        text, mask, _ = encoder(prompts)
        loss = lm(codes, text.detach(), mask).float().square().mean()
        gradients = torch.autograd.grad(loss, list(lm.parameters()))
        played = torch.cat(list(generate(lm, encoder, prompts, 4, [1, 2], block=2)), 2)
        results.append([loss, *gradients, played])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1, a.abs().max().item()))


# ------------------------------------------------------------------------------------------------
# Compiled, without a GPU: every card's shared memory suffices, and no register is spilled

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes a program may have


def kernels(dtype, P, N, arch):
    """(name, kernel, constants, types) of all launches at one shape. A constant None: no tensor."""
    k, H = ssd_kernel, 32
    c = k.configurations(dtype, H, P, N, 256, SHARED_MEMORY[arch])
    low = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = dict.fromkeys("v w x dy own other CB dCB states S out zxBCdt y".split(), low)
    types |= {"L": "i32", "chunks": "i32", "eps": "fp32"}
    nothing = lambda names: dict.fromkeys(names.split())
    step = dict(H=H, P=P, N=N, K=4, num_warps=8, num_stages=3)
    NB, ALL = (k.triton.next_power_of_2(n) for n in (N, H * P + 2 * N))
    for kernel, constants in [
        (k.states_kernel, c["states"] | dict(REVERSE=False) | nothing("first S")),
        (k.states_kernel, c["states"] | dict(REVERSE=True)),
        (k.output_kernel, c["output"] | dict(FROM=1, REVERSE=False) | nothing("x ddt dD")),
        (k.output_kernel, c["output"] | dict(FROM=0, REVERSE=True)),
        (k.dcb_kernel, c["dcb"]),
        (k.dbc_kernel, c["dbc"] | dict(SLOT=4, REVERSE=False)),
        (k.dbc_kernel, c["dbc"] | dict(SLOT=12, REVERSE=True)),
        (k.step_kernel, step | dict(ROWS=min(32, P), NB=NB)),
        (k.norm_kernel, step | dict(ALL=ALL)),
    ]:
        name = kernel.__name__.removesuffix("_kernel") + "'" * constants.get("REVERSE", False)
        yield name, kernel, constants, types


def resources(kernel, constants, types, arch, folder):
    """Bytes of shared memory, registers a thread and spills of a kernel, compiled for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    signature, given, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], given[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "*fp32")
            if signature[name].startswith("*"):
                aligned[(i,)] = [["tt.divisibility", 16]]  # as the launcher finds PyTorch's tensors
    source = ASTSource(kernel, signature, given, aligned)
    program = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    (cubin := folder / "kernel.cubin").write_bytes(program.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    dump = lambda flag: subprocess.run([tool, flag, cubin], capture_output=True, text=True).stdout
    registers = int(re.search(r"REG:(\d+)", dump("-res-usage"))[1])
    return program.metadata.shared, registers, len(re.findall(r"\b(?:STL|LDL)\b", dump("-sass")))


@outside
@pytest.mark.usefixtures("interpreter")  # which works on while this compiles
@pytest.mark.parametrize(
    "arch, dtype, P, N",
    [(arch, torch.bfloat16, 64, 512) for arch in SHARED_MEMORY]
    + [(86, torch.float32, 64, 128), (86, torch.float16, 16, 16), (90, torch.bfloat16, 128, 128)],
)
def test_compiled_kernels_fit_the_card_and_do_not_spill(arch, dtype, P, N, tmp_path):
    for name, *kernel in kernels(dtype, P, N, arch):
        shared, registers, spills = resources(*kernel, arch, tmp_path)
        print(f"sm_{arch} {str(dtype)[6:]:8} {name:8} {shared:7} B {registers:4} registers")
        assert shared <= SHARED_MEMORY[arch] and spills == 0, name


@outside
def test_everything_in_the_interpreter(interpreter):
    output, _ = interpreter.communicate()
    assert interpreter.returncode == 0, output


# ------------------------------------------------------------------------------------------------
# On a GPU


@on_cuda
@pytest.mark.parametrize("L, H, P, N", [(600, 3, 64, 512), (257, 2, 128, 64), (900, 4, 16, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_cuda(L, H, P, N, dtype):
    args = inputs(L, L=L, H=H, P=P, N=N)
    args[4] = args[4].detach() / N**0.5
    compare(args, dtype, 1e-4 if dtype == torch.float32 else 1e-2, "cuda")


@on_cuda
def test_steps_on_cuda():
    check_steps("cuda")


@on_cuda
def test_compile_on_cuda():
    args = [a.detach().float().cuda().requires_grad_() for a in inputs(6, L=300, P=64, N=64)]
    compiled = torch.compile(ssd_kernel.ssd, fullgraph=True)
    loss = lambda f: sum(v.square().sum() for v in f(*args))
    for a, b in zip(*(torch.autograd.grad(loss(f), args) for f in (ssd_kernel.ssd, compiled))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


@on_cuda
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
