"""The SSD three ways: the loop, the chunks and the kernels give the same numbers.

`ssd_recurrent`, the loop over time, is the definition. The two fast ways are compared with it in
float64: outputs, final state and all gradients. The last section does the same for single steps.

The kernels run on a GPU if there is one. Otherwise they run on the CPU in Triton's interpreter,
which executes each program of the grid in NumPy: slow, but the same arithmetic.
"""

import os
import shutil
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import ssd_kernel  # noqa: E402
from model import (  # noqa: E402
    Context,
    LMConfig,
    Mamba2,
    mamba_step,
    ssd_chunked,
    ssd_recurrent,
)


class Way(NamedTuple):
    function: object
    dtype: torch.dtype
    device: str
    tolerance: float  # relative error, in norm, against the loop in float64


# Tolerances: a few times the errors in docs/kernel.md, which `experiments.bench errors` measures.
GPU = torch.cuda.is_available()
CHUNKS = Way(ssd_chunked, torch.float64, "cpu", 1e-10)
KERNEL = Way(ssd_kernel.ssd, torch.float32, "cuda" if GPU else "cpu", 1e-4 if GPU else 1e-5)
needs_triton = pytest.mark.skipif(ssd_kernel.triton is None, reason="needs Triton")
WAYS = [pytest.param(CHUNKS, id="chunks"), pytest.param(KERNEL, id="kernel", marks=needs_triton)]
each_way = pytest.mark.parametrize("way", WAYS)


def inputs(seed=0, B=2, L=50, H=3, P=4, N=5, decay=1.0):
    """Random arguments of an SSD, in float64. `decay` scales how fast the state decays."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return dict(
        x=normal(B, L, H, P),
        dt=decay * torch.nn.functional.softplus(normal(B, L, H) - 1),
        A=-torch.exp(normal(H)),
        B=normal(B, L, N),
        C=normal(B, L, N),
        D=normal(H),
        initial_state=normal(B, H, P, N),
    )


def cast(args, dtype, device="cpu"):
    """x, B and C in dtype, the rest in fp32 or fp64: as a layer passes them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: v.detach().to(device, dtype if name in ("x", "B", "C") else wide).requires_grad_()
        for name, v in args.items()
    }


def part(args, frames):
    """The arguments for some of the frames: a slice."""
    return args | {name: args[name][:, frames] for name in ("x", "dt", "B", "C")}


def outputs_and_gradients(function, args, **options):
    """{"y", "final_state", "dx", "ddt", ...}: gradients of a random weighting of both outputs."""
    y, state = function(**args, **options)
    g = torch.Generator().manual_seed(99)
    random = lambda v: torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.device)
    loss = (y * random(y)).sum() + (state * random(state)).sum()
    gradients = torch.autograd.grad(loss, list(args.values()))
    return dict(y=y, final_state=state) | {"d" + k: v for k, v in zip(args, gradients)}


def check(found, expected, tolerance):
    for name, right in expected.items():
        value = found[name].double().cpu()
        assert value.isfinite().all(), name
        error = (value - right).norm() / (right.norm() + 0.1)
        limit = 5 * tolerance if name == "dA" else tolerance  # dA: a sum of terms that cancel
        assert error <= limit, f"{name}: relative error {error:.1e}"


def compare(way, args, left_out=(), **options):
    """One way against the loop, both from the same numbers."""
    args = cast(args, way.dtype, way.device)
    expected = outputs_and_gradients(ssd_recurrent, cast(args, torch.float64))
    expected = {name: v for name, v in expected.items() if name not in left_out}
    check(outputs_and_gradients(way.function, args, **options), expected, way.tolerance)


# ------------------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("way", [pytest.param(None, id="loop"), *WAYS])
def test_four_frames_by_hand(way):
    # One head, P = N = 1, exp(dt A) = 1/2, B = C = 1: the state halves, then x is added.
    x = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    ones = torch.ones(1, 4, 1)
    args = dict(x=x, dt=ones, A=torch.tensor([0.5]).log(), B=ones, C=ones)
    if way is None:
        y, state = ssd_recurrent(**args)
    else:
        y, state = way.function(**{k: v.to(way.device) for k, v in args.items()}, chunk=2)
    assert y.flatten().tolist() == pytest.approx([1, 2.5, 5.25, 10.625])
    assert state.item() == pytest.approx(10.625)


@each_way
@pytest.mark.parametrize("chunk", [1, 8, 16, 256])
@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 55])
def test_outputs_and_all_gradients_are_those_of_the_loop(way, L, chunk):
    compare(way, inputs(L, L=L), chunk=chunk)


@each_way
@pytest.mark.parametrize("left_out", [["D"], ["initial_state"], ["D", "initial_state"]])
def test_without_skip_and_without_initial_state(way, left_out):
    args = {k: v for k, v in inputs(1, L=20).items() if k not in left_out}
    compare(way, args, chunk=16)


def test_gradients_of_the_chunks_are_those_of_finite_differences():
    args = cast(inputs(B=1, L=7, H=2, P=2, N=3), torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ssd_chunked(*a, chunk=3), list(args.values()))


@each_way
def test_no_frames_leave_the_state_as_it_is(way):
    args = cast(inputs(L=0), way.dtype, way.device)
    y, state = way.function(**args)
    assert y.shape == args["x"].shape
    assert torch.equal(state, args["initial_state"])


@each_way
@pytest.mark.parametrize("output", [0, 1], ids=["y", "final state"])
def test_gradients_of_one_output_alone(way, output):
    args = inputs(9, L=33)
    gradients = []
    for function, values in [
        (ssd_recurrent, cast(args, torch.float64)),
        (lambda **a: way.function(**a, chunk=16), cast(args, way.dtype, way.device)),
    ]:
        loss = function(**values)[output].square().sum()
        found = torch.autograd.grad(loss, list(values.values()), materialize_grads=True)
        gradients.append(dict(zip(values, found)))
    check(gradients[1], gradients[0], way.tolerance)


# ------------------------------------------------------------------------------------------------
# What a state and causality promise


@each_way
@pytest.mark.parametrize("cut", [1, 13, 16, 40])
def test_a_sequence_cut_in_two_and_chained_is_the_sequence(way, cut):
    args = cast(inputs(1), way.dtype, way.device)
    y, state = way.function(**args, chunk=16)
    y1, middle = way.function(**part(args, slice(cut)), chunk=16)
    rest = part(args, slice(cut, None)) | dict(initial_state=middle)
    y2, end = way.function(**rest, chunk=16)
    expected = dict(y=y.double().cpu(), state=state.double().cpu())
    check(dict(y=torch.cat([y1, y2], 1), state=end), expected, way.tolerance)


@each_way
def test_the_future_does_not_reach_the_past(way):
    args = cast(inputs(2), way.dtype, way.device)
    y, _ = way.function(**args, chunk=16)
    for g in torch.autograd.grad(y[:, 20].sum(), [args[name] for name in ("x", "dt", "B", "C")]):
        assert g[:, 21:].abs().max() == 0
        assert g[:, :21].abs().max() > 0


@each_way
@pytest.mark.parametrize("bad", ["nan x", "inf x", "nan dt", "inf B", "nan C"])
def test_nan_and_inf_in_a_frame_leave_the_past_as_it_is(way, bad):
    number, name = bad.split()
    args = inputs(3, L=40, H=1)
    spoilt = args | {name: args[name].clone()}
    spoilt[name][1, 20] = float(number)  # the second sequence, inside a chunk
    results = []
    for values in (args, spoilt):
        values = cast(values, way.dtype, way.device)
        y, state = way.function(**values, chunk=16)
        loss = y[0].sum() + y[1, :20].sum()
        gradients = torch.autograd.grad(loss, list(values.values()))
        results.append([y, state, *gradients])
    (y, state, *gradients), (spoilt_y, spoilt_state, *spoilt_gradients) = results
    assert torch.equal(spoilt_y[0], y[0]) and torch.equal(spoilt_y[1, :20], y[1, :20])
    assert spoilt_y[1, 20:].isnan().all() and spoilt_state[1].isnan().all()
    for spoilt_gradient, gradient in zip(spoilt_gradients, gradients):
        torch.testing.assert_close(spoilt_gradient, gradient)


@each_way
def test_packed_sequences_do_not_see_each_other_when_the_state_is_cleared_between(way):
    # A frame with a huge dt and no input empties the state: what follows starts from nothing.
    args = inputs(3) | dict(initial_state=None)
    args["x"][:, 20] = 0
    args["dt"][:, 20] = 1e4
    args = {k: v if v is None else v.to(way.device, way.dtype) for k, v in args.items()}
    y, _ = way.function(**args, chunk=16)
    alone, _ = way.function(**part(args, slice(21, None)), chunk=16)
    # Behind a huge number in a cumulative sum, fp32 keeps a thousandth of what follows.
    tolerance = 1e-3 if way.dtype == torch.float32 else way.tolerance
    check(dict(y=y[:, 21:]), dict(y=alone.double().cpu()), tolerance)


@each_way
@pytest.mark.parametrize("decay", [1e-3, 1.0, 50.0, 1e4])
def test_strong_and_weak_decays_stay_finite_and_right_in_fp32(way, decay):
    # A chunk's cumulative sum of strong decays is in the thousands. In fp32 it is good to 1e-4, and
    # differences of it are exponents.
    tolerance = 1e-3 if decay > 1 else 2e-5
    way = way._replace(dtype=torch.float32, tolerance=max(tolerance, way.tolerance))
    # At the strongest decay no frame remembers another. Then dA is zero but for the rounding of
    # summands that cancel.
    compare(way, inputs(4, L=100, decay=decay), ["dA"] if decay == 1e4 else [], chunk=64)


@pytest.mark.parametrize("function", [ssd_recurrent, ssd_chunked])
def test_the_state_is_fp32_in_bf16(function):
    y, state = function(**{k: v.bfloat16() for k, v in inputs(5).items()})
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


# ------------------------------------------------------------------------------------------------
# Steps


compiler = GPU or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not compiler, reason="needs a C++ compiler")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_steps_of_a_mamba_layer_are_its_forward(compiled):
    torch.manual_seed(0)
    layer = Mamba2(LMConfig(d_model=40, d_state=24, headdim=20)).to(KERNEL.device)
    if compiled:  # as `sample.prepare` does
        layer.step_function = torch.compile(mamba_step, dynamic=False)
    layer.norm.weight.data.uniform_(0.5, 2)
    layer.D.data.uniform_(0.5, 2)
    h = torch.randn(3, 12, 40, device=KERNEL.device)
    everything = Context(None, None, None)
    with torch.no_grad():
        y, end = layer(h, everything)
        _, state = layer(h[:, :7], everything)
        for t in range(7, 12):
            found = layer.step(h[:, t], state)
            torch.testing.assert_close(found, y[:, t], rtol=1e-4, atol=1e-5)
    for after_steps, after_forward in zip(state, end):
        torch.testing.assert_close(after_steps, after_forward, rtol=1e-4, atol=1e-5)
