"""The SSD on a GPU: the chunked scan with its whole backward, and one step of decoding, in Triton.

`ssd` is the function of `model.ssd_chunked`; read that first, it is the same mathematics in forty
lines of PyTorch. This file is about the one thing PyTorch cannot say: what stays on the chip.

A chunk is Q frames. Inside it a_i = sum_{k <= i} dt_k A is the logarithm of the decay from its
beginning to frame i, a_Q that of the whole chunk. S_c is the state that enters chunk c:

    y_i     = e^{a_i} S_c C_i      + sum_{j <= i} e^{a_i - a_j} (C_i . B_j) dt_j x_j + D x_i    (1)
    S_{c+1} = e^{a_Q} S_c          + sum_j        e^{a_Q - a_j} dt_j x_j B_j^T                  (2)

and with G_c the gradient of the state that leaves chunk c, differentiation gives

    dx_j    = dt_j (e^{a_Q - a_j} G_c B_j + sum_{i >= j} e^{a_i - a_j} (C_i . B_j) dy_i)
                                                                           + D dy_j             (3)
    G_{c-1} = e^{a_Q} G_c          + sum_i        e^{a_i} dy_i C_i^T                            (4)

This is the same scan, run backwards in time with B and C exchanged. So there are four kernels,
and three of them serve twice, told apart by the constant REVERSE:

    states_kernel   (2), (4)   passes the state along the chunks
    output_kernel   (1), (3)   y from x, dx from dy
    dcb_kernel                 the gradient of C . B^T, and of the decays inside a chunk
    dbc_kernel                 dC from dy, dB from x, and the decays between chunks

and two small ones at the end make `step`, one frame of decoding. The few numbers a frame and head
(dt, a, and their gradients) are left to PyTorch, and C . B^T is one batched matrix product of its
own. To autograd and `torch.compile` all of it is one operator.

How many bytes: at the paper's shape (B 4, L 2600, H 32, P 64, N 512, bf16, Q 256) x and y are
43 MB each, B and C 11 MB, C . B^T 6 MB, and the states 92 MB, since every chunk of 256 frames
carries one of 64 x 512 for each head. A longer chunk has fewer states to carry but more pairs of
frames to look at; at N = 512, Q = 256 the latter are still a fifth of the arithmetic. Forward is
54 GFLOP and some 300 MB: on an H200 (0.8 PFLOP/s, 4.8 TB/s) 0.07 ms either way.

Letters are model.py's: B batch, L length, H heads, P headdim, N d_state, Q chunk. In the kernels
v stands for x or dy, w for B or C; an index in a kernel (q, r, s, p, n) is a vector of positions.
"""

from __future__ import annotations  # the kernels name types of Triton, which may be missing

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for Macs, nor in torch's builds without CUDA
    triton = None

# Kernels that nobody can run are left as plain functions.
jit = triton.jit if triton else lambda kernel: kernel

# The backward needs the states that entered the chunks. Made again they cost 22 GFLOP; kept, 92 MB
# a layer at the paper's shape, 2.2 GB in all its layers, of the 24 that an RTX 3090 has.
KEEP_STATES = False

DTYPES = torch.bfloat16, torch.float16, torch.float32


@jit
def load(base, rows, columns, stride, height, width):
    """A tile (rows, columns) of a row-major matrix, zero outside its height and width."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def store(base, rows, columns, stride, height, width, tile):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    place = base + rows[:, None] * stride + columns[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=inside)


@jit
def dot(left, right, total):
    """total + left right. Of fp32 numbers a tensor core sees 11 bits; in three passes, 22."""
    return tl.dot(left, right, total, input_precision="tf32x3")


@jit
def fade(a, q, Q: tl.constexpr, TO_END: tl.constexpr):
    """e^{a_q}, the decay from the chunk's beginning to frame q, or e^{a_Q - a_q}, on to its end."""
    now = tl.load(a + q)
    return tl.exp(tl.load(a + Q - 1) - now) if TO_END else tl.exp(now)


# ------------------------------------------------------------------------------------------------
# (2)  S_{c+1} = e^{a_Q} S_c + sum_j e^{a_Q - a_j} dt_j x_j B_j^T          v = x,  w = B
# (4)  G_{c-1} = e^{a_Q} G_c + sum_i e^{a_i} dy_i C_i^T                    v = dy, w = C   REVERSE
#
# A program owns one head's state, all P rows and a tile of its N columns, and walks with it through
# the chunks: the recurrence over chunks happens in registers, in fp32, and never waits for another
# program. At each chunk it leaves a copy of what enters (the other kernels read it), then takes in
# the chunk's frames as one matrix product. Neighbouring programs share a head, so that v comes from
# DRAM once and N / tile - 1 times from L2. Reads v (43 MB) and w, writes the states (92 MB).
#
# In reverse it also reads S back, tile by tile, for <G_c, S_c>: what a_Q gets for fading the state.


@jit
def states_kernel(
    v, w, dt, a, first, states, last, S, GS, L, chunks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, STEP: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (N + NB - 1) // NB
    tile, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    p, n, q = tl.arange(0, PB), tile * NB + tl.arange(0, NB), tl.arange(0, STEP)
    state = tl.zeros((PB, NB), tl.float32)
    if first is not None:
        state += load(first + bh * P * N, p, n, N, P, N)
    for k in range(chunks):
        c = chunks - 1 - k if REVERSE else k
        bch = (b * chunks + c) * H + h
        store(states + bch * P * N, p, n, N, P, N, state)
        if REVERSE:
            tl.store(GS + bch * tiles + tile, tl.sum(state * load(S + bch * P * N, p, n, N, P, N)))
        state *= tl.exp(tl.load(a + bch * Q + Q - 1))
        for q0 in range(0, Q, STEP):
            scale = fade(a + bch * Q, q0 + q, Q, not REVERSE)
            if not REVERSE:
                scale *= tl.load(dt + bch * Q + q0 + q)
            t = c * Q + q0
            vs = load(v + ((b * L + t) * H + h) * P, q, p, H * P, L - t, P)  # (STEP, PB)
            ws = load(w + ((b * chunks + c) * Q + q0) * N, q, n, N, Q, N)  # (STEP, NB)
            state = dot(tl.trans((vs * scale[:, None]).to(vs.dtype)), ws, state)
    store(last + bh * P * N, p, n, N, P, N, state)


# ------------------------------------------------------------------------------------------------
# (1)  y_i  = e^{a_i} S_c C_i + sum_{j <= i} e^{a_i - a_j} (C_i . B_j) dt_j x_j + D x_i
# (3)  dx_j = dt_j (e^{a_Q - a_j} G_c B_j + sum_{i >= j} e^{a_i - a_j} (C_i . B_j) dy_i) + D dy_j
#
# A program owns ROWS frames r of one head of one chunk. First the state's word, N / STEP products
# (ROWS, STEP) x (STEP, P); then the frames s that r sees (that see r, in reverse), STEP at a time:
# the decays are made in registers, between the load of C . B^T and its product with v, so that the
# (H, Q, Q) matrix which PyTorch writes out, 185 MB a layer, exists nowhere. The grid runs over the
# tiles of a chunk, then over heads, then over chunks: programs side by side share a state, and all
# heads share C and C . B^T, which stay in L2. Reads the states (92 MB), v and x; writes out (43).
#
# FROM is the first chunk, in the order of the scan, that any state enters.
# In reverse the sums over P that only the owner can make: ddt = x . dx / dt, and dD = x . dy.


@jit
def output_kernel(
    v, w, dt, a, CB, states, D, out, x, ddt, dD, L, chunks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    FROM: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = Q // ROWS
    tile, h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    bc = (tl.program_id(0) // tiles // H).to(tl.int64)
    b, c, bch = bc // chunks, bc % chunks, bc * H + h
    left = L - c * Q  # frames of the sequence from this chunk's first on
    here = ((b * L + c * Q) * H + h) * P
    a, dt = a + bch * Q, dt + bch * Q
    r, p = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, PB)

    y = tl.zeros((ROWS, PB), tl.float32)
    entered = (chunks - 1 - c if REVERSE else c) >= FROM
    for n0 in range(0, tl.where(entered, N, 0), NB):
        n = n0 + tl.arange(0, NB)
        ws = load(w + bc * Q * N, r, n, N, Q, N)  # (ROWS, NB)
        y = dot(ws, tl.trans(load(states + bch * P * N, p, n, N, P, N)), y)
    y *= fade(a, r, Q, REVERSE)[:, None]

    for s0 in range(tile * ROWS if REVERSE else 0, Q if REVERSE else tile * ROWS + ROWS, STEP):
        s = s0 + tl.arange(0, STEP)
        decay = tl.load(a + r)[:, None] - tl.load(a + s)[None, :]  # (ROWS, STEP)
        # Masked before the exponential: beyond the diagonal the difference is positive, and may
        # overflow where the state fades fast.
        if REVERSE:
            M = tl.trans(load(CB + bc * Q * Q, s, r, Q, Q, Q))
            M *= tl.exp(tl.where(s[None, :] >= r[:, None], -decay, -float("inf")))
        else:
            M = load(CB + bc * Q * Q, r, s, Q, Q, Q)
            M *= tl.exp(tl.where(s[None, :] <= r[:, None], decay, -float("inf")))
            M *= tl.load(dt + s)[None, :]
        y = dot(M.to(v.dtype.element_ty), load(v + here, s, p, H * P, left, P), y)

    vs = load(v + here, r, p, H * P, left, P).to(tl.float32)
    if REVERSE:
        xs = load(x + here, r, p, H * P, left, P)
        tl.store(ddt + bch * Q + r, tl.sum(xs * y, 1))
        tl.store(dD + bch * Q + r, tl.sum(xs * vs, 1))
        y *= tl.load(dt + r)[:, None]
    if D is not None:
        y += tl.load(D + h) * vs
    store(out + here, r, p, H * P, left, P, y)


# ------------------------------------------------------------------------------------------------
# With W_ij = e^{a_i - a_j} (C_i . B_j) dt_j (dy_i . x_j), the part of frame j in y_i . dy_i, head
# by head, for j <= i:
#
#     d(C . B^T)_ij = sum over heads of e^{a_i - a_j} dt_j (dy_i . x_j)
#     da_i          = sum_{j < i} W_ij - sum_{k > i} W_ki
#
# The decays from j to i get the W of all pairs they lie between, which PyTorch makes of da when it
# goes back through the cumulative sum. Row and column sums nearly cancel in it; they are therefore
# sums of the same fp32 numbers, and the diagonal, which has no decay, stays out. (dy_i . y_i less
# the same for x is equal on paper, and in bf16 wrong by up to its own size.)
#
# A program owns a tile (i, j) of one chunk, on or below the diagonal, and loops over the heads, to
# sum over them in registers. Tiles of a chunk lie side by side in the grid: they read the same dy
# and x (43 MB each) at the same time. Each pair of tiles has its own slot of da for its sums (rows
# i in slot j, columns j in slot i), so that nothing is added in an order left to chance.


@jit
def dcb_kernel(
    dy, x, dt, a, CB, dCB, da, L, chunks,
    H: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = Q // TILE
    i_tile, j_tile = tl.program_id(0) % tiles, tl.program_id(0) // tiles % tiles
    if j_tile > i_tile:
        return
    bc = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    b, c = bc // chunks, bc % chunks
    i, j = i_tile * TILE + tl.arange(0, TILE), j_tile * TILE + tl.arange(0, TILE)
    p = tl.arange(0, PB)
    pairs = load(CB + bc * Q * Q, i, j, Q, Q, Q)
    total = tl.zeros((TILE, TILE), tl.float32)
    for h in range(H):
        at = (bc * H + h) * Q
        here = ((b * L + c * Q) * H + h) * P
        each = tl.zeros((TILE, TILE), tl.float32)
        for p0 in range(0, P, PB):
            dys = load(dy + here, i, p0 + p, H * P, L - c * Q, P)  # (TILE, PB)
            xs = load(x + here, j, p0 + p, H * P, L - c * Q, P)
            each = dot(dys, tl.trans(xs), each)
        decay = tl.load(a + at + i)[:, None] - tl.load(a + at + j)[None, :]
        decay = tl.exp(tl.where(i[:, None] >= j[None, :], decay, -float("inf")))
        each *= decay * tl.load(dt + at + j)[None, :]
        total += each
        W = tl.where(i[:, None] > j[None, :], each * pairs, 0.0)
        rows, columns = tl.sum(W, 1), -tl.sum(W, 0)
        slot = da + (bc * H + h) * SLOTS * Q
        if i_tile == j_tile:
            tl.store(slot + i_tile * Q + i, rows + columns)
        else:
            tl.store(slot + j_tile * Q + i, rows)
            tl.store(slot + i_tile * Q + j, columns)
    store(dCB + bc * Q * Q, i, j, Q, Q, Q, total)


# ------------------------------------------------------------------------------------------------
# dC_i = sum_{j <= i} d(C . B^T)_ij B_j + sum over heads of e^{a_i} S_c^T dy_i
# dB_j = sum_{i >= j} d(C . B^T)_ij C_i + sum over heads of e^{a_Q - a_j} dt_j G_c^T x_j   REVERSE
#
# B and C are shared by the heads, so their gradients are sums over heads: a program owns a tile of
# ROWS frames and NB columns and loops over the heads, adding in registers what would else be H
# times 11 MB. In passing, what the frame's decay gets for its share in the state, C_i . (the head's
# summand of dC_i), and minus that of B_j. Tiles of a chunk lie side by side: a state tile comes
# from DRAM once and Q / ROWS - 1 times from L2. Reads v (43 MB) and the states (92); writes 11 MB.


@jit
def dbc_kernel(
    v, own, other, dt, a, states, dCB, out, da, L, chunks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SLOTS: tl.constexpr, SLOT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    row_tiles: tl.constexpr = Q // ROWS
    tiles: tl.constexpr = (N + NB - 1) // NB
    r_tile, n_tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles % tiles
    bc = (tl.program_id(0) // row_tiles // tiles).to(tl.int64)
    b, c = bc // chunks, bc % chunks
    r, p, n = r_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, PB), n_tile * NB + tl.arange(0, NB)
    mine = load(own + bc * Q * N, r, n, N, Q, N)
    total = tl.zeros((ROWS, NB), tl.float32)
    for h in range(H):
        bch = bc * H + h
        scale = fade(a + bch * Q, r, Q, REVERSE)
        if REVERSE:
            scale *= tl.load(dt + bch * Q + r)
        here = ((b * L + c * Q) * H + h) * P
        each = tl.zeros((ROWS, NB), tl.float32)
        for p0 in range(0, P, PB):
            vs = load(v + here, r, p0 + p, H * P, L - c * Q, P)  # (ROWS, PB)
            each = dot(vs, load(states + bch * P * N, p0 + p, n, N, P, N), each)
        each *= scale[:, None]
        total += each
        share = tl.sum(each * mine, 1)
        tl.store(da + (bch * SLOTS + SLOT + n_tile) * Q + r, -share if REVERSE else share)
    for s0 in range(r_tile * ROWS if REVERSE else 0, Q if REVERSE else r_tile * ROWS + ROWS, STEP):
        s = s0 + tl.arange(0, STEP)
        if REVERSE:
            pairs = tl.trans(load(dCB + bc * Q * Q, s, r, Q, Q, Q))
        else:
            pairs = load(dCB + bc * Q * Q, r, s, Q, Q, Q)
        # Above the diagonal dCB was never written.
        seen = s[None, :] >= r[:, None] if REVERSE else s[None, :] <= r[:, None]
        pairs = tl.where(seen, pairs, 0.0).to(other.dtype.element_ty)
        total = dot(pairs, load(other + bc * Q * N, s, n, N, Q, N), total)
    store(out + bc * Q * N, r, n, N, Q, N, total)


# ------------------------------------------------------------------------------------------------
# One frame of decoding, everything of `model.Mamba2.step` between its two projections:
#
#     x, B, C = SiLU(conv of the last K inputs)                     dt = softplus(dt + dt_bias)
#     S <- e^{-dt e^{A_log}} S + dt x B^T      y = RMSNorm((S C + D x) * SiLU(z))
#
# No product of matrices: this is reading and writing the state, in fp32 8.4 MB a sequence at the
# paper's shape, 17 MB with guidance's other half, 3.5 us on an H200. A program owns ROWS rows of
# one head's state, all N columns, so that its rows of y need nobody else; it makes B and C of its
# sequence anew, from L2, rather than wait for another program. The mean of squares needs all heads:
# hence a second, small launch, a program a sequence, which also shifts the convolution's inputs,
# now that nobody reads them any more.


@jit
def convolve(inputs, new, weight, bias, channels, width, inside, K: tl.constexpr):
    """SiLU of the convolution's output at the newest frame, for some of its `width` channels."""
    y = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        frame = inputs + k * width if k < K - 1 else new
        tap = tl.load(weight + channels * K + k, mask=inside, other=0.0).to(tl.float32)
        y += tap * tl.load(frame + channels, mask=inside, other=0.0).to(tl.float32)
    return y * tl.sigmoid(y)


@jit
def step_kernel(
    zxBCdt, inputs, state, weight, bias, dt_bias, A_log, D, gated,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (P + ROWS - 1) // ROWS
    width: tl.constexpr = H * P + 2 * N
    tile, h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    z, inputs = zxBCdt + b * (H * P + width + H), inputs + b * (K - 1) * width
    new = z + H * P
    p, n = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, NB)
    x = convolve(inputs, new, weight, bias, h * P + p, width, p < P, K)  # (ROWS,)
    B = convolve(inputs, new, weight, bias, H * P + n, width, n < N, K)  # (NB,)
    C = convolve(inputs, new, weight, bias, H * P + N + n, width, n < N, K)
    v = tl.load(new + width + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e  # and log(1 + e) with the digits of e that u has lost (Kahan)
    dt = tl.maximum(v, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
    here = state + (b * H + h) * P * N
    S = load(here, p, n, N, P, N) * tl.exp(-dt * tl.exp(tl.load(A_log + h).to(tl.float32)))
    S += (dt * x)[:, None] * B[None, :]
    store(here, p, n, N, P, N, S)
    y = tl.sum(S * C[None, :], 1) + tl.load(D + h).to(tl.float32) * x
    gate = tl.load(z + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    tl.store(gated + (b * H + h) * P + p, y * gate * tl.sigmoid(gate), mask=p < P)


@jit
def norm_kernel(
    gated, zxBCdt, inputs, norm, y, eps,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = H * P + 2 * N
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ALL)
    g = tl.load(gated + b * H * P + i, mask=i < H * P, other=0.0)
    g *= tl.rsqrt(tl.sum(g * g, 0) / (H * P) + eps)
    g *= tl.load(norm + i, mask=i < H * P, other=0.0).to(tl.float32)
    tl.store(y + b * H * P + i, g.to(y.dtype.element_ty), mask=i < H * P)
    inputs += b * (K - 1) * width
    new = zxBCdt + b * (H * P + width + H) + H * P
    for k in tl.static_range(K - 1):
        later = inputs + (k + 1) * width if k < K - 2 else new
        frame = tl.load(later + i, mask=i < width, other=0.0)
        tl.store(inputs + k * width + i, frame.to(inputs.dtype.element_ty), mask=i < width)


# ------------------------------------------------------------------------------------------------
# The operator: sizes, launches, and what autograd and torch.compile have to know


def configurations(dtype, H, P, N, Q, shared_memory):
    """The constants of each kernel, where a program may have so many bytes of shared memory.

    Tiles of 128 with 8 warps halve what the products read from L2, and fill an H100's 227 KB. Other
    cards have room for 64, and fp32, in three passes of the tensor cores, has registers for 32.
    """
    if dtype == torch.float32:
        tile, warps, stages = 32, 4, 2
    elif shared_memory >= 200_000 and P <= 64:
        tile, warps, stages = 128, 8, 3
    else:
        tile, warps, stages = 64, 4 if P <= 64 else 8, 2
    power = lambda size: max(16, triton.next_power_of_2(size))  # what tl.arange and tl.dot take
    NB, ROWS, STEP = min(tile, power(N)), min(tile, Q), min(tile, 64, Q)
    shape = dict(H=H, P=P, Q=Q, PB=power(P), num_warps=warps, num_stages=stages)
    part = dict(PB=min(power(P), tile), SLOTS=Q // STEP + 2 * triton.cdiv(N, NB))
    return dict(
        states=dict(shape, N=N, NB=NB, STEP=STEP),
        output=dict(shape, N=N, NB=min(64, NB), ROWS=ROWS, STEP=STEP),
        dcb=dict(shape | part, TILE=STEP, num_warps=8),
        dbc=dict(shape | part, N=N, NB=NB, ROWS=ROWS, STEP=STEP),
    )


def _configurations(x, a, N):
    of = torch.cuda.get_device_properties
    shared_memory = of(x.device).shared_memory_per_block_optin if x.is_cuda else 0
    return configurations(x.dtype, *x.shape[2:], N, a.shape[-1], shared_memory)


def _launch(kernel, programs, tensor, *args, **constants):
    with torch.cuda.device_of(tensor):
        kernel[(programs,)](tensor, *args, **constants)


def _states(v, w, dt, a, first, S=None):
    """(2), or given S (4): the state entering each chunk (B,c,H,P,N), the last one, and <G, S>."""
    (b, L, H, P), chunks, N = v.shape, a.shape[1], w.shape[-1]
    config = _configurations(v, a, N)["states"]
    tiles = triton.cdiv(N, config["NB"])
    states = v.new_empty(b, chunks, H, P, N)
    last = v.new_empty(b, H, P, N, dtype=torch.float32)
    GS = v.new_empty(b, chunks, H, tiles, dtype=torch.float32)
    args = v, w, dt, a, first, states, last, S, GS, L, chunks
    _launch(states_kernel, tiles * b * H, *args, **config, REVERSE=S is not None)
    return states, last, GS.sum(-1)


@torch.library.custom_op("ssd::forward", mutates_args=())
def ssd_forward(
    x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B,L,H,P); dt, a (B,c,H,Q) fp32; B, C (B,c,Q,N) -> y, the final and the entering states."""
    (b, L, H, _), chunks, N = x.shape, a.shape[1], B.shape[-1]
    states, last, _ = _states(x, B, dt, a, first)
    y, config = torch.empty_like(x), _configurations(x, a, N)["output"]
    programs = a.shape[-1] // config["ROWS"] * H * b * chunks
    args = x, C, dt, a, C @ B.mT, states, D, y, None, None, None, L, chunks
    _launch(output_kernel, programs, *args, **config, FROM=int(first is None), REVERSE=False)
    return y, last, states


@ssd_forward.register_fake
def _(x, dt, a, B, C, D, first):
    (b, _, H, P), chunks, N = x.shape, a.shape[1], B.shape[-1]
    last = x.new_empty(b, H, P, N, dtype=torch.float32)
    return torch.empty_like(x), last, x.new_empty(b, chunks, H, P, N)


@torch.library.custom_op("ssd::backward", mutates_args=())
def ssd_backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, first: Tensor | None, S: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, ddt, da, dB, dC, dD, dfirst, each of its tensor's shape."""
    (b, L, H, _), chunks, Q, N = x.shape, a.shape[1], a.shape[-1], B.shape[-1]
    configs = _configurations(x, a, N)
    S = _states(x, B, dt, a, first)[0] if S is None else S
    G, dfirst, GS = _states(dy, C, dt, a, dlast, S)

    CB, dCB, dx, dB, dC = C @ B.mT, B.new_empty(b, chunks, Q, Q), *map(torch.empty_like, (x, B, C))
    ddt, dD = torch.empty_like(dt), torch.empty_like(dt)
    programs = Q // configs["output"]["ROWS"] * H * b * chunks
    args = dy, B, dt, a, CB, G, D, dx, x, ddt, dD, L, chunks
    _launch(
        output_kernel, programs, *args, **configs["output"], FROM=int(dlast is None), REVERSE=True
    )

    # da's summands, each in a slot of its own: those inside the chunk, of dC, of dB.
    da = dt.new_empty(b, chunks, H, configs["dcb"]["SLOTS"], Q)
    tiles = Q // configs["dcb"]["TILE"]
    args = dy, x, dt, a, CB, dCB, da, L, chunks
    _launch(dcb_kernel, tiles * tiles * b * chunks, *args, **configs["dcb"])
    config = configs["dbc"]
    columns = triton.cdiv(N, config["NB"])
    programs = Q // config["ROWS"] * columns * b * chunks
    args = dy, C, B, dt, a, S, dCB, dC, da, L, chunks
    _launch(dbc_kernel, programs, *args, **config, SLOT=tiles, REVERSE=False)
    args = x, B, C, dt, a, G, dCB, dB, da, L, chunks
    _launch(dbc_kernel, programs, *args, **config, SLOT=tiles + columns, REVERSE=True)

    # a_Q stands in the decay of every share in the state, and in that of the state as a whole.
    shares = da[..., -columns:, :].sum((-2, -1))  # (B, c, H)
    da = da.sum(-2)
    da[..., -1] += torch.exp(a[..., -1]) * GS - shares
    return dx, ddt, da, dB, dC, dD.sum((0, 1, 3)), dfirst


@ssd_backward.register_fake
def _(dy, dlast, x, dt, a, B, C, D, first, S):
    last = x.new_empty(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32)
    dD = dt.new_empty(x.shape[2])
    return *map(torch.empty_like, (x, dt, a, B, C)), dD, last


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[2] if KEEP_STATES else None)


def _differentiate(ctx, dy, dlast, _):
    x, dt, a, B, C, D, first, S = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    *grads, dD, dfirst = ssd_backward(dy, dlast, x, dt, a, B, C, D, first, S)
    return *grads, None if D is None else dD, None if first is None else dfirst


ssd_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("ssd::step", mutates_args=("conv", "state"))
def step(
    zxBCdt: Tensor, conv: Tensor, state: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor,
    A_log: Tensor, D: Tensor, norm: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """One frame through the middle of `model.Mamba2`: what in_proj gave -> what out_proj takes.

    zxBCdt (B, 2 H P + 2 N + H); conv (B, K-1, H P + 2 N) and state (B,H,P,N) fp32, contiguous, are
    updated in place; weight (H P + 2 N, K) and bias of the convolution; dt_bias, A_log, D (H,);
    norm (H P,), the RMSNorm's weight, and eps -> (B, H P), of zxBCdt's dtype.
    """
    (b, H, P, N), K = state.shape, weight.shape[1]
    zxBCdt, weight = zxBCdt.contiguous(), weight.contiguous()
    gated, y = state.new_empty(b, H * P), zxBCdt.new_empty(b, H * P)
    ROWS, NB = min(32, triton.next_power_of_2(P)), triton.next_power_of_2(N)
    args = zxBCdt, conv, state, weight, bias, dt_bias, A_log, D, gated
    shape = dict(H=H, P=P, N=N, K=K, num_warps=8)
    _launch(step_kernel, triton.cdiv(P, ROWS) * H * b, *args, **shape, ROWS=ROWS, NB=NB)
    args, ALL = (gated, zxBCdt, conv, norm, y, eps), triton.next_power_of_2(H * P + 2 * N)
    _launch(norm_kernel, b, *args, **shape, ALL=ALL)
    return y


@step.register_fake
def _(zxBCdt, conv, state, weight, bias, dt_bias, A_log, D, norm, eps):
    return zxBCdt.new_empty(state.shape[0], state.shape[1] * state.shape[2])


@functools.cache  # asked by every layer at every step of decoding
def obstacle(device):
    """Why the kernels cannot run on a device, in one line; None if they can."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" or torch.version.hip:
        this = "an AMD one" if device.type == "cuda" else device.type
        return f"the Triton kernels are for NVIDIA GPUs, and this is {this}"
    if torch.cuda.get_device_properties(device).major < 8:
        return "the Triton kernels need a GPU of sm_80 or later"
    return None


def path(device):
    """Which implementation of the SSD runs on a device, and why: a line to print."""
    reason = obstacle(device)
    return f"SSD in PyTorch ({reason})" if reason else "SSD in Triton kernels"


def nan_stays_causal(scan):
    """Keeps a NaN or an inf in frame t out of the outputs and gradients of the frames before t.

    A product of matrices multiplies masked entries by zero, and 0 * NaN is NaN. So the scan sees
    zeros in such a frame, and its outputs become NaN from that frame on.
    """

    @functools.wraps(scan)
    def contained(x, dt, A, B, C, D=None, initial_state=None, chunk=256):
        with torch.no_grad():  # NaN at the frames that have a NaN or an inf, 0 at the others
            sums = (v.sum(2, dtype=torch.float32) for v in (x.flatten(2), dt, B, C))
            poison = 0 * sum(sums)[..., None]  # (B, L, 1)
            finite = poison == 0
        # Where it costs nothing to ask, good inputs are not copied.
        ask = type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()
        if ask and finite.all():
            return scan(x, dt, A, B, C, D, initial_state, chunk)
        x = torch.where(finite[..., None], x, 0)
        dt, B, C = (torch.where(finite, v, 0) for v in (dt, B, C))
        y, state = scan(x, dt, A, B, C, D, initial_state, chunk)
        poison = poison.cumsum(1)[..., None]  # (B, L, 1, 1)
        return y + poison.to(y.dtype), state + poison.sum(1, keepdim=True)

    return contained


def available(x):
    """Whether `ssd` can take x (..., P): model.Mamba2 asks, and uses model.ssd_chunked if not."""
    return obstacle(x.device) is None and x.dtype in DTYPES and x.shape[-1] <= 128


@nan_stays_causal
def ssd(x, dt, A, B, C, D=None, initial_state=None, chunk=256):
    """The SSD by the kernels above: y and the final state, as `model.ssd_recurrent` defines them.

    x (B,L,H,P) in bf16, fp16 or fp32, dt (B,L,H) after softplus, A (H,) negative, B and C (B,L,N),
    D (H,) or None, initial_state (B,H,P,N) or None for zeros -> y like x, final_state fp32.
    Any L and N, P up to 128; `chunk` changes the speed alone: it is rounded up to a power of two,
    at least 16.
    ValueError without Triton, and for what it has no kernel for.
    """
    if triton is None:
        raise ValueError("ssd_kernel needs Triton: pip install triton, or use model.ssd_chunked")
    if x.dtype not in DTYPES or x.shape[-1] > 128:
        raise ValueError(
            f"ssd_kernel takes bf16, fp16 or fp32 and a headdim up to 128, not {x.dtype} and "
            f"{x.shape[-1]}; use model.ssd_chunked"
        )
    Q = max(16, 1 << (min(chunk, x.shape[1]) - 1).bit_length())  # a power of two
    # The last chunk is filled up with dt = 0, frames that neither fade nor feed the state. The
    # cumulative sum begins anew in every chunk, or the small differences would lose their digits.
    missing = max(1, triton.cdiv(x.shape[1], Q)) * Q - x.shape[1]
    dt = rearrange(F.pad(dt.float(), (0, 0, 0, missing)), "b (c q) h -> b c h q", q=Q).contiguous()
    a = (dt * A.float()[:, None]).cumsum(-1)
    B, C = (F.pad(v.to(x.dtype), (0, 0, 0, missing)).contiguous() for v in (B, C))
    B, C = (v.unflatten(1, (-1, Q)) for v in (B, C))  # (B, c, Q, N)
    D, first = (None if v is None else v.float().contiguous() for v in (D, initial_state))
    y, last, _ = ssd_forward(x.contiguous(), dt, a, B, C, D, first)
    return y, last
