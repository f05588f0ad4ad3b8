"""The SSD: every fast path against the recurrence, in float64."""

import pytest
import torch

from model import ssd_chunked, ssd_recurrent


def inputs(seed=0, B=2, L=50, H=3, P=4, N=5, decay=1.0):
    """Random x, dt, A, B, C, D and an initial state; `decay` scales how fast the state fades."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    dt = decay * torch.nn.functional.softplus(normal(B, L, H) - 1)
    A = -torch.exp(normal(H))
    values = [normal(B, L, H, P), dt, A, normal(B, L, N), normal(B, L, N), normal(H)]
    return [v.requires_grad_() for v in [*values, normal(B, H, P, N)]]


def outputs_and_gradients(f, args, **options):
    """y, final state, and the gradients of a random weighting of both, in that order."""
    y, state = f(*args, **options)
    g = torch.Generator().manual_seed(99)
    random = lambda v: torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.device)
    weigh = lambda v: (v * random(v)).sum()
    return [y, state, *torch.autograd.grad(weigh(y) + weigh(state), args)]


@pytest.mark.parametrize("chunk", [1, 8, 16, 256])
@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 55])
def test_chunked_equals_recurrent_with_all_gradients(L, chunk):
    args = inputs(L, L=L)
    expected = outputs_and_gradients(ssd_recurrent, args)
    for a, b in zip(expected, outputs_and_gradients(ssd_chunked, args, chunk=chunk)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_recurrence_by_hand():
    # One head, P = N = 1, exp(dt A) = 1/2: the state halves and takes in dt x B.
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(1, 3, 1, 1)
    dt = torch.full((1, 3, 1), 2.0, dtype=torch.float64)
    A = torch.log(torch.tensor([0.5], dtype=torch.float64)) / 2
    ones = torch.ones(1, 3, 1, dtype=torch.float64)
    y, state = ssd_recurrent(x, dt, A, ones, 3 * ones, D=torch.tensor([10.0]))
    assert y.flatten().tolist() == pytest.approx([3 * 2 + 10, 3 * 5 + 20, 3 * 10.5 + 40])
    assert state.item() == pytest.approx(10.5)


def test_gradcheck():
    args = inputs(B=1, L=7, H=2, P=2, N=3)
    assert torch.autograd.gradcheck(lambda *a: ssd_chunked(*a, chunk=3), args)


@pytest.mark.parametrize("cut", [1, 13, 16, 40])
def test_a_sequence_cut_in_two_and_chained_is_the_sequence(cut):
    x, dt, A, B, C, D, state = inputs(1)
    whole = ssd_chunked(x, dt, A, B, C, D, state, chunk=8)
    y1, state = ssd_chunked(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, state, chunk=8)
    y2, state = ssd_chunked(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, state, chunk=8)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole[0])
    torch.testing.assert_close(state, whole[1])


def test_the_future_does_not_reach_the_past():
    x, dt, A, B, C, D, state = inputs(2)
    y, _ = ssd_chunked(x, dt, A, B, C, D, state, chunk=16)
    gradient = torch.autograd.grad(y[:, 20].sum(), [x, dt, B, C])
    for g in gradient:
        assert g[:, 21:].abs().max() == 0 and g[:, :21].abs().max() > 0


def test_packed_sequences_do_not_see_each_other_when_the_state_is_forgotten_between():
    # A frame with a huge dt A and no input empties the state: what follows starts from nothing.
    x, dt, A, B, C, D, _ = (v.detach() for v in inputs(3))
    x[:, 20], dt[:, 20] = 0, 1e4
    y, _ = ssd_chunked(x, dt, A, B, C, D, chunk=16)
    alone, _ = ssd_chunked(x[:, 21:], dt[:, 21:], A, B[:, 21:], C[:, 21:], D, chunk=16)
    torch.testing.assert_close(y[:, 21:], alone)


@pytest.mark.parametrize("decay", [1e-3, 1.0, 50.0, 1e4])
def test_strong_and_weak_decays_stay_finite_and_right_in_fp32(decay):
    args64 = inputs(4, L=300, decay=decay)
    args32 = [a.detach().float().requires_grad_() for a in args64]
    expected = outputs_and_gradients(ssd_recurrent, args64)
    for a, b in zip(expected, outputs_and_gradients(ssd_chunked, args32, chunk=64)):
        assert b.isfinite().all()
        # A chunk's cumsum of strong decays is in the thousands, good to 1e-4 in fp32, and its
        # differences stand in an exponent.
        assert (a - b).norm() <= (1e-3 if decay > 1 else 2e-5) * a.norm() + 1e-6


def test_the_state_is_fp32_in_bf16():
    args = [a.detach().bfloat16() for a in inputs(5)]
    for f in (ssd_recurrent, ssd_chunked):
        y, state = f(*args)
        assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
