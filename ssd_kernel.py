"""The SSD on a GPU: the chunked scan and its backward pass, as Triton kernels.

`ssd` computes what `model.ssd_chunked` computes; read that first. docs/kernel.md derives the
formulas, draws the tiling of each kernel and counts the bytes.

A chunk is Q frames. Inside it a_i = sum_{k <= i} dt_k A is the logarithm of the decay from the
chunk's start to frame i. S_c is the state that enters chunk c, G_c the gradient of the state that
leaves it. The backward pass is the forward pass, run backwards in time with B and C exchanged: the
constant REVERSE turns one into the other. PyTorch computes C . B^T, and what is small.

Letters are model.py's: B batch, L length, H heads, P headdim, N d_state, Q chunk. In the kernels

    v, w                     stand for x or dy, and for B or C
    i, j, n, p               are vectors of positions: frames, columns and rows of the state
    BLOCK_P, BLOCK_N         rows and columns of a tile of the state
    OWN_FRAMES, LOOP_FRAMES  frames that a program owns, and that it reads per iteration
    PARTS                    partial sums of a decay's gradient
    good                     frames before the first NaN or inf; later ones count as missing
"""

from __future__ import annotations  # the kernels name types of Triton, which may be missing

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # on Macs, and in PyTorch's builds without CUDA
    triton = None

jit = triton.jit if triton else lambda kernel: kernel

DTYPES = torch.bfloat16, torch.float16, torch.float32


@jit
def load(base, rows, columns, stride, height, width):
    """A tile (rows, columns) of a row-major matrix. Zeros outside its height and width."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def store(base, rows, columns, stride, height, width, tile):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], tile, mask=inside)


@jit
def dot(left, right, total):
    """total + left right. tf32x3: three products of 11-bit numbers make one of 22-bit numbers."""
    # On Blackwell, some versions of Triton compile two dots into one accumulator in one loop body
    # wrongly (triton #10821). Here no loop body has two, and no dot reads an accumulator.
    return tl.dot(left, right, total, input_precision="tf32x3")


@jit
def decay(a, i, Q: constexpr, TO_END: constexpr):
    """e^{a_i}, the decay from the chunk's start to frame i; TO_END: e^{a_Q - a_i}, to its end."""
    log = tl.load(a + i)
    return tl.exp2(tl.load(a + Q - 1) - log) if TO_END else tl.exp2(log)


@jit
def decay_between(a, i, j):
    """The matrix e^{-|a_i - a_j|}. In either direction of time it is at most 1."""
    return tl.exp2(-tl.abs(tl.load(a + i)[:, None] - tl.load(a + j)[None, :]))


@jit
def pairs(matrix, i, j, Q: constexpr, REVERSE: constexpr):
    """Entries (i, j) of a matrix (Q,Q), zero where j > i; REVERSE: (j, i), zero where j < i."""
    tile = tl.trans(load(matrix, j, i, Q, Q, Q)) if REVERSE else load(matrix, i, j, Q, Q, Q)
    seen = j[None, :] >= i[:, None] if REVERSE else j[None, :] <= i[:, None]
    return tl.where(seen, tile, 0.0)


@jit
def place():
    """The program's place in the grid. 64 bits in the last, or large offsets would wrap around."""
    return tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)


# ------------------------------------------------------------------------------------------------
# (2)  S_{c+1} = e^{a_Q} S_c + sum_j e^{a_Q - a_j} dt_j x_j B_j^T          v = x,  w = B
# (4)  G_{c-1} = e^{a_Q} G_c + sum_i e^{a_i} dy_i C_i^T                    v = dy, w = C   REVERSE
#
# Owns the state of one head: all P rows, BLOCK_N columns, in registers, in fp32. No program waits
# for another, since columns do not mix. Loops over the chunks and over the frames of each. Reads v
# and w; REVERSE also S. Writes the state that enters each chunk, and the last one; REVERSE also
# <G_c, S_c>, the gradient of the decay of the state as a whole.


@jit
def states_kernel(
    v, w, dt, a, first, states, last, S, GS, good, L, chunks,
    H: constexpr, P: constexpr, N: constexpr, Q: constexpr, BLOCK_P: constexpr, BLOCK_N: constexpr,
    LOOP_FRAMES: constexpr, REVERSE: constexpr,
):  # fmt: skip
    tiles: constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, h, b = place()
    p = tl.arange(0, BLOCK_P)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.load(good + b)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if first is not None:
        state += load(first + (b * H + h) * P * N, p, n, N, P, N)
    for k in range(chunks):
        c = chunks - 1 - k if REVERSE else k
        bch = (b * chunks + c) * H + h
        store(states + bch * P * N, p, n, N, P, N, state)
        if REVERSE:
            tl.store(GS + bch * tiles + tile, tl.sum(state * load(S + bch * P * N, p, n, N, P, N)))
        state *= tl.exp2(tl.load(a + bch * Q + Q - 1))
        t = b * L + c * Q  # the chunk's first frame in memory
        for j0 in range(0, Q, LOOP_FRAMES):
            j = j0 + tl.arange(0, LOOP_FRAMES)
            weight = decay(a + bch * Q, j, Q, not REVERSE)
            if not REVERSE:
                weight *= tl.load(dt + bch * Q + j)
            vs = load(v + (t * H + h) * P, j, p, H * P, length - c * Q, P)  # (LOOP_FRAMES, BLOCK_P)
            ws = load(w + t * N, j, n, N, length - c * Q, N)  # (LOOP_FRAMES, BLOCK_N)
            state = dot(tl.trans((vs * weight[:, None]).to(vs.dtype)), ws, state)
    if not REVERSE:
        state += tl.where(length < L, float("nan"), 0.0)
    store(last + (b * H + h) * P * N, p, n, N, P, N, state)


# ------------------------------------------------------------------------------------------------
# (1)  y_i  = e^{a_i} S_c C_i + sum_{j <= i} e^{a_i - a_j} (C_i . B_j) dt_j x_j + D x_i
# (3)  dx_j = dt_j (e^{a_Q - a_j} G_c B_j + sum_{i >= j} e^{a_i - a_j} (C_i . B_j) dy_i) + D dy_j
#                                                            v = x, w = C; REVERSE: v = dy, w = B
# Owns OWN_FRAMES frames (i) of one head of one chunk. Loops over the columns of the state, then
# over the frames (j) that i sees (REVERSE: that see i). The decays are computed in registers: the
# matrix (H,Q,Q) of decayed scores, which PyTorch writes to memory, does not exist. Reads the
# states, v, w and C . B^T. Writes y or dx; REVERSE also the part of dt's gradient that does not
# come through decays, x . dx / dt, and D's gradient, x . dy. Without `first`, the state that enters
# the first chunk (REVERSE: the last) is zero, and is not read.


@jit
def output_kernel(
    v, w, dt, a, CB, first, states, D, out, x, ddt, dD, good, L, chunks,
    H: constexpr, P: constexpr, N: constexpr, Q: constexpr, BLOCK_P: constexpr, BLOCK_N: constexpr,
    OWN_FRAMES: constexpr, LOOP_FRAMES: constexpr, REVERSE: constexpr,
):  # fmt: skip
    tile, h, bc = place()
    c = bc % chunks
    t = bc // chunks * L + c * Q  # the chunk's first frame in memory
    left = tl.load(good + bc // chunks) - c * Q  # good frames from there on
    bch = bc * H + h
    v += (t * H + h) * P
    a += bch * Q
    dt += bch * Q
    i = tile * OWN_FRAMES + tl.arange(0, OWN_FRAMES)
    p = tl.arange(0, BLOCK_P)

    y = tl.zeros((OWN_FRAMES, BLOCK_P), tl.float32)
    at_start = c == chunks - 1 if REVERSE else c == 0
    for n0 in range(0, tl.where(at_start & (first is None), 0, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        ws = load(w + t * N, i, n, N, left, N)  # (OWN_FRAMES, BLOCK_N)
        state = load(states + bch * P * N, p, n, N, P, N)  # (BLOCK_P, BLOCK_N)
        y = dot(ws, tl.trans(state), y)
    y *= decay(a, i, Q, REVERSE)[:, None]

    start = tile * OWN_FRAMES if REVERSE else 0
    for j0 in range(start, Q if REVERSE else tile * OWN_FRAMES + OWN_FRAMES, LOOP_FRAMES):
        j = j0 + tl.arange(0, LOOP_FRAMES)
        scores = pairs(CB + bc * Q * Q, i, j, Q, REVERSE) * decay_between(a, i, j)
        if not REVERSE:
            scores *= tl.load(dt + j)[None, :]
        vs = load(v, j, p, H * P, left, P)  # (LOOP_FRAMES, BLOCK_P)
        y = dot(scores.to(vs.dtype), vs, y)

    vs = load(v, i, p, H * P, left, P).to(tl.float32)
    if REVERSE:
        xs = load(x + (t * H + h) * P, i, p, H * P, left, P)
        tl.store(ddt + bch * Q + i, tl.sum(xs * y, 1))
        tl.store(dD + bch * Q + i, tl.sum(xs * vs, 1))
        y *= tl.load(dt + i)[:, None]
    else:
        y += tl.where(i < left, 0.0, float("nan"))[:, None]
    store(out + (t * H + h) * P, i, p, H * P, L - c * Q, P, y + tl.load(D + h) * vs)


# ------------------------------------------------------------------------------------------------
# W_ij = e^{a_i - a_j} (C_i . B_j) dt_j (dy_i . x_j) is what frame j <= i adds to y_i . dy_i.
#     dCB_ij = sum over heads of e^{a_i - a_j} dt_j (dy_i . x_j)
#     da_i   = sum_{j < i} W_ij - sum_{k > i} W_ki, for each head
#
# Owns a tile (i, j) of one chunk, on or below the diagonal. Loops over the heads, and so sums over
# them in registers. Reads dy, x and C . B^T. Writes dCB (B,c,Q,Q), and for each head the sums of W
# over the tile's rows and columns, each to its own place in `parts`: the order of programs does not
# matter. The two sums in da nearly cancel. They are sums of the same fp32 numbers, without the
# diagonal, which has no decay.


@jit
def dcb_kernel(
    dy, x, dt, a, CB, dCB, parts, good, L, chunks,
    H: constexpr, P: constexpr, Q: constexpr, BLOCK_P: constexpr, OWN_FRAMES: constexpr,
    PARTS: constexpr,
):  # fmt: skip
    i_tile, j_tile, bc = place()
    if j_tile > i_tile:
        return
    c = bc % chunks
    t = bc // chunks * L + c * Q
    left = tl.load(good + bc // chunks) - c * Q
    i = i_tile * OWN_FRAMES + tl.arange(0, OWN_FRAMES)
    j = j_tile * OWN_FRAMES + tl.arange(0, OWN_FRAMES)
    scores = load(CB + bc * Q * Q, i, j, Q, Q, Q)
    total = tl.zeros((OWN_FRAMES, OWN_FRAMES), tl.float32)
    for h in range(H):
        bch = bc * H + h
        each = tl.zeros((OWN_FRAMES, OWN_FRAMES), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            dys = load(dy + (t * H + h) * P, i, p, H * P, left, P)  # (OWN_FRAMES, BLOCK_P)
            xs = load(x + (t * H + h) * P, j, p, H * P, left, P)
            each = dot(dys, tl.trans(xs), each)
        each *= decay_between(a + bch * Q, i, j) * tl.load(dt + bch * Q + j)[None, :]
        each = tl.where(i[:, None] >= j[None, :], each, 0.0)
        total += each
        W = tl.where(i[:, None] > j[None, :], each * scores, 0.0)
        rows = tl.sum(W, 1)
        columns = tl.sum(W, 0)
        part = parts + bch * PARTS * Q
        tl.store(part + j_tile * Q + i, tl.where(i_tile == j_tile, rows - columns, rows))
        if i_tile > j_tile:
            tl.store(part + i_tile * Q + j, -columns)
    store(dCB + bc * Q * Q, i, j, Q, Q, Q, total)


# ------------------------------------------------------------------------------------------------
# dC_i = sum_{j <= i} dCB_ij B_j + sum over heads of e^{a_i} S_c^T dy_i
# dB_j = sum_{i >= j} dCB_ij C_i + sum over heads of e^{a_Q - a_j} dt_j G_c^T x_j           REVERSE
#
# Owns OWN_FRAMES frames and BLOCK_N columns of dC or dB. Loops over the heads, which share B and C,
# then over the other frames of the chunk. Reads v (dy; REVERSE: x), the states (S; REVERSE: G),
# `other` (B; REVERSE: C) and dCB. Writes dC or dB, and per frame and head C_i . (the head's summand
# of dC_i), or the same of B and dB: the gradient of the decay to the chunk's start, or to its end.


@jit
def dbc_kernel(
    v, own, other, dt, a, states, dCB, out, parts, good, L, chunks,
    H: constexpr, P: constexpr, N: constexpr, Q: constexpr, BLOCK_P: constexpr, BLOCK_N: constexpr,
    OWN_FRAMES: constexpr, LOOP_FRAMES: constexpr, PARTS: constexpr, REVERSE: constexpr,
):  # fmt: skip
    i_tile, n_tile, bc = place()
    c = bc % chunks
    t = bc // chunks * L + c * Q
    left = tl.load(good + bc // chunks) - c * Q
    i = i_tile * OWN_FRAMES + tl.arange(0, OWN_FRAMES)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = load(own + t * N, i, n, N, left, N)
    total = tl.zeros((OWN_FRAMES, BLOCK_N), tl.float32)
    for h in range(H):
        bch = bc * H + h
        weight = decay(a + bch * Q, i, Q, REVERSE)
        if REVERSE:
            weight *= tl.load(dt + bch * Q + i)
        each = tl.zeros((OWN_FRAMES, BLOCK_N), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            vs = load(v + (t * H + h) * P, i, p, H * P, left, P)  # (OWN_FRAMES, BLOCK_P)
            state = load(states + bch * P * N, p, n, N, P, N)  # (BLOCK_P, BLOCK_N)
            each = dot(vs, state, each)
        each *= weight[:, None]
        total += each
        tl.store(parts + (bch * PARTS + n_tile) * Q + i, tl.sum(each * mine, 1))

    start = i_tile * OWN_FRAMES if REVERSE else 0
    for j0 in range(start, Q if REVERSE else i_tile * OWN_FRAMES + OWN_FRAMES, LOOP_FRAMES):
        j = j0 + tl.arange(0, LOOP_FRAMES)
        others = load(other + t * N, j, n, N, left, N)  # (LOOP_FRAMES, BLOCK_N)
        weights = pairs(dCB + bc * Q * Q, i, j, Q, REVERSE)
        total = dot(weights.to(others.dtype), others, total)
    store(out + t * N, i, n, N, L - c * Q, N, total)


# ------------------------------------------------------------------------------------------------
# The operator: tile sizes, launches, and what autograd and torch.compile need


def configurations(dtype, H, P, N, Q, shared_memory, capability):
    """The constants of each kernel, for a GPU of compute capability `capability` (H100: 9) whose
    programs may have so many bytes of shared memory. Tiles of 128 frames halve what the products
    read from L2, but need an H100's 227 KB. In fp32, registers suffice for 32."""
    if dtype == torch.float32:
        frames, warps, stages = 32, 4, 2
    elif shared_memory >= 200_000 and P <= 64:
        frames, warps, stages = 128, 8, 3
    else:
        frames, warps, stages = 64, 4 if P <= 64 else 8, 2
    if capability >= 10:
        stages = 1  # Blackwell: Triton to 3.7 pipelines loops over chunks wrongly (triton #10590)
    power = lambda size: max(16, triton.next_power_of_2(size))  # what tl.arange and tl.dot take
    LOOP_FRAMES, BLOCK_N = min(frames, 64, Q), min(frames, power(N))
    shape = dict(H=H, P=P, Q=Q, BLOCK_P=power(P), num_warps=warps, num_stages=stages)
    loop = dict(N=N, BLOCK_N=BLOCK_N, LOOP_FRAMES=LOOP_FRAMES)
    own = dict(OWN_FRAMES=min(frames, Q))
    parts = dict(BLOCK_P=min(power(P), frames), PARTS=Q // LOOP_FRAMES + 2 * -(-N // BLOCK_N))
    return dict(
        states=shape | loop,
        output=shape | loop | own | dict(BLOCK_N=min(64, BLOCK_N)),
        dcb=shape | parts | dict(OWN_FRAMES=LOOP_FRAMES, num_warps=8),
        dbc=shape | loop | own | parts | dict(num_warps=8),
    )


def _launch(kernel, grid, tensor, *args, **constants):
    with torch.cuda.device_of(tensor):
        kernel[grid](tensor, *args, **constants)


def _prepare(x, dt, A, B, C, good, Q):
    """The kernels' constants, dt and a (B,c,H,Q) in fp32, and C . B^T (B,c,Q,Q), zero beyond L."""
    L, N = B.shape[1:]
    on = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    limits = (on.shared_memory_per_block_optin, on.major) if on else (0, 0)
    config = configurations(x.dtype, *x.shape[2:], N, Q, *limits)
    # Frames that are missing get dt = 0, at which the state stays as it is. The sum starts again in
    # every chunk: over the whole sequence it would lose the digits of its small differences. A
    # GPU's exponential is that of base 2, hence a in units of log 2.
    dt = F.pad(dt, (0, 0, 0, Q if L == 0 else -L % Q))
    missing = torch.arange(dt.shape[1], device=dt.device) >= good[:, None]  # (B, c Q)
    dt = dt.masked_fill(missing[..., None], 0)
    dt = dt.unflatten(1, (-1, Q)).transpose(2, 3).contiguous()
    a = (dt * (A / math.log(2))[:, None]).cumsum(-1)
    # First whole chunks, then the rest, so that B and C are not copied.
    CB = B.new_zeros(len(B), a.shape[1], Q, Q)
    whole = L // Q
    B_whole, C_whole = (v[:, : whole * Q].unflatten(1, (whole, Q)) for v in (B, C))
    CB[:, :whole] = C_whole @ B_whole.mT
    CB[:, whole:, : L % Q, : L % Q] = (C[:, whole * Q :] @ B[:, whole * Q :].mT)[:, None]
    return config, dt, a, CB.masked_fill_(missing.view(len(B), -1, Q, 1), 0)


def _states(v, w, dt, a, first, good, config, S=None):
    """(2), or (4) if S is given: the state entering each chunk (B,c,H,P,N), the last, <G, S>."""
    b, L, H, P = v.shape
    chunks, N = a.shape[1], w.shape[-1]
    tiles = triton.cdiv(N, config["states"]["BLOCK_N"])
    states = v.new_empty(b, chunks, H, P, N)
    last = v.new_empty(b, H, P, N, dtype=torch.float32)
    GS = v.new_empty(b, chunks, H, tiles, dtype=torch.float32)
    args = v, w, dt, a, first, states, last, S, GS, good, L, chunks
    _launch(states_kernel, (tiles, H, b), *args, **config["states"], REVERSE=S is not None)
    return states, last, GS.sum(-1)


@torch.library.custom_op("ssd::forward", mutates_args=())
def ssd_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, first: Tensor | None,
    good: Tensor, Q: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `ssd`, contiguous, x, B and C of one dtype, the rest fp32."""
    config, dt, a, CB = _prepare(x, dt, A, B, C, good, Q)
    b, chunks, H, Q = a.shape
    states, last, _ = _states(x, B, dt, a, first, good, config)
    y = torch.empty_like(x)
    args = x, C, dt, a, CB, first, states, D, y, None, None, None, good, x.shape[1], chunks
    grid = Q // config["output"]["OWN_FRAMES"], H, b * chunks
    _launch(output_kernel, grid, *args, **config["output"], REVERSE=False)
    return y, last


@ssd_forward.register_fake
def _(x, dt, A, B, C, D, first, good, Q):
    b, L, H, P = x.shape
    return torch.empty_like(x), x.new_empty(b, H, P, B.shape[-1], dtype=torch.float32)


@torch.library.custom_op("ssd::backward", mutates_args=())
def ssd_backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor, first: Tensor | None, good: Tensor, Q: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, ddt, dA, dB, dC, dD, dfirst, each with its tensor's shape. The states that enter the
    chunks are computed again: kept, they would take 92 MB a layer at the paper's shape."""
    config, dt, a, CB = _prepare(x, dt, A, B, C, good, Q)
    L, (b, chunks, H, Q) = x.shape[1], a.shape
    S = _states(x, B, dt, a, first, good, config)[0]
    G, dfirst, GS = _states(dy, C, dt, a, dlast, good, config, S)
    dx, dB, dC, dCB, direct, dD = map(torch.empty_like, (x, B, C, CB, dt, dt))
    args = dy, B, dt, a, CB, dlast, G, D, dx, x, direct, dD, good, L, chunks
    grid = Q // config["output"]["OWN_FRAMES"], H, b * chunks
    _launch(output_kernel, grid, *args, **config["output"], REVERSE=True)
    parts = dt.new_empty(b, chunks, H, config["dbc"]["PARTS"], Q)  # of da: pairs, dC, dB
    tiles = Q // config["dcb"]["OWN_FRAMES"]
    args = dy, x, dt, a, CB, dCB, parts, good, L, chunks
    _launch(dcb_kernel, (tiles, tiles, b * chunks), *args, **config["dcb"])
    columns = triton.cdiv(B.shape[-1], config["dbc"]["BLOCK_N"])
    grid = Q // config["dbc"]["OWN_FRAMES"], columns, b * chunks
    args = dy, C, B, dt, a, S, dCB, dC, parts[..., tiles:, :], good, L, chunks
    _launch(dbc_kernel, grid, *args, **config["dbc"], REVERSE=False)
    args = x, B, C, dt, a, G, dCB, dB, parts[..., tiles + columns :, :], good, L, chunks
    _launch(dbc_kernel, grid, *args, **config["dbc"], REVERSE=True)

    # The gradient of frame k's decay, dt_k A: that of all e^{a_i} and e^{a_i - a_j} with
    # j < k <= i, of all e^{a_Q - a_j} with j < k, and of e^{a_Q}.
    until = parts[..., :-columns, :].sum(-2)  # (B, c, H, Q)
    until[..., -1] += torch.exp2(a[..., -1]) * GS
    since = parts[..., -columns:, :].sum(-2)
    each = until.flip(-1).cumsum(-1).flip(-1) + F.pad(since.cumsum(-1), (1, -1))
    ddt = (direct + A[:, None] * each).transpose(2, 3).flatten(1, 2)[:, :L].contiguous()
    return dx, ddt, (dt * each).sum((0, 1, 3)), dB, dC, dD.sum((0, 1, 3)), dfirst


@ssd_backward.register_fake
def _(dy, dlast, x, dt, A, B, C, D, first, good, Q):
    dfirst = x.new_empty(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32)
    return *map(torch.empty_like, (x, dt, A, B, C, A)), dfirst


def _save(ctx, inputs, output):
    *tensors, ctx.Q = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy, dlast):
    x, first = ctx.saved_tensors[0], ctx.saved_tensors[6]
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    *grads, dfirst = ssd_backward(dy, dlast, *ctx.saved_tensors, ctx.Q)
    return *grads, None if first is None else dfirst, None, None


ssd_forward.register_autograd(_differentiate, setup_context=_save)


@functools.cache  # every layer asks
def obstacle(device):
    """Why the kernels cannot run on a device, in one line. None if they can."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" or torch.version.hip:
        this = "AMD's" if torch.version.hip else device.type
        return f"the Triton kernels are for NVIDIA GPUs, not for {this}"
    if torch.cuda.get_device_properties(device).major < 8:
        return "the Triton kernels need a GPU of sm_80 or later"
    return None


def path(device):
    """A line that says which implementation of the SSD runs on a device, and why."""
    reason = obstacle(device)
    return f"SSD in PyTorch ({reason})" if reason else "SSD in Triton kernels"


def available(x):
    """Whether `ssd` takes x (..., P). If not, model.Mamba2 uses model.ssd_chunked."""
    return obstacle(x.device) is None and x.dtype in DTYPES and x.shape[-1] <= 128


def good_frames(x, dt, B, C):
    """(B, L): whether all numbers of a frame and of those before it are finite. Later frames count
    as missing, and have NaN outputs: masked entries of a matrix product do not hide a NaN."""
    sums = sum(v.detach().sum(2, dtype=torch.float32) for v in (x.flatten(2), dt, B, C))
    return sums.isfinite().cumprod(1).bool()


def ssd(x, dt, A, B, C, D=None, initial_state=None, chunk=256):
    """The SSD by the kernels above: y and the final state, as `model.ssd_recurrent` defines them.

    x (B,L,H,P) in bf16, fp16 or fp32, dt (B,L,H) after softplus, A (H,) negative, B and C (B,L,N),
    D (H,) or None, initial_state (B,H,P,N) or None for zeros -> y like x, final_state in fp32.
    Any L and N, P up to 128. `chunk` changes speed only. It is rounded up to a power of two, at
    least 16. ValueError without Triton, and for other dtypes and larger P.
    """
    if triton is None or x.dtype not in DTYPES or x.shape[-1] > 128:
        needs = "Triton, a headdim up to 128, and bf16, fp16 or fp32"
        raise ValueError(f"ssd_kernel needs {needs}: here use model.ssd_chunked")
    D = A.new_zeros(x.shape[2]) if D is None else D
    x, B, C = (v.to(x.dtype).contiguous() for v in (x, B, C))
    dt, A, D = (v.float().contiguous() for v in (dt, A, D))
    first = None if initial_state is None else initial_state.float().contiguous()
    good = good_frames(x, dt, B, C).sum(1, dtype=torch.int32)
    Q = max(16, 1 << (min(chunk, x.shape[1]) - 1).bit_length())
    return ssd_forward(x, dt, A, B, C, D, first, good, Q)
