"""The language models: from text and the codec tokens so far to the next codec tokens.

A clip of audio is a table of integers, K codebooks by L frames (`codec.py` makes it, 86.13 frames
a second). A language model reads it from left to right and, at every frame, gives a distribution
over the next one. Text comes in either as a *prefix*, as if it were the beginning of the music, or
through *cross-attention*. This file holds all of it, from the small parts to the whole:

    1  the SSD         `ssd_recurrent` (the definition) and `ssd_chunked` (the same, in parallel)
    2  the layers      Mamba2, FeedForward, EinFFT, SelfAttention, CrossAttention
    3  the model       LMConfig, MusicLM: `forward` over a sequence, `step` over one token
    4  the text        TextEncoder: Flan-T5, or a small T5 of the same class
    5  sampling        `generate`: guidance, temperature, top-k and top-p, one seed per sample
    6  checkpoints     a folder with config.json and model.safetensors
    7  the command     options made of a dataclass, errors told in one sentence

Letters, the same in every file:

    B batch    L length (frames)    K codebooks    V vocabulary: 1024 codes + 1 special token
    D d_model  H heads              P headdim      N d_state      Q chunk      S length of the text

In the SSD's formulas B, C, D and S are keys, queries, the skip's weight and the state instead.

Papers: the models are those of arXiv 2601.14786 ("SSMTTM" below), Fig. 1; Mamba-2 and the SSD are
from arXiv 2405.21060 ("SSD paper"); the delay pattern is MusicGen's, arXiv 2306.05284.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssd_kernel
from authors import is_authors, read_authors
from codec import FRAME_RATE

# ------------------------------------------------------------------------------------------------
# 1  The SSD: a linear recurrence whose state is a matrix
#
# Every head carries a state S, a (P, N) matrix. At each frame the state fades by a scalar and takes
# in one outer product; the output reads it through C:
#
#     S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T          y_t = S_t C_t + D x_t
#
# dt, B and C depend on the input ("selective"), A < 0 and D are learned constants of the head, and
# B and C are shared by all heads. (SSD paper, eq. 1 with the discretisation of sec. 2; SSMTTM (2))


def ssd_recurrent(x, dt, A, B, C, D=None, initial_state=None):
    """The definition, a loop over time. Slow, obvious; everything else is tested against it.

    x (B,L,H,P), dt (B,L,H) after softplus, A (H,) negative, B and C (B,L,N), D (H,) or None,
    initial_state (B,H,P,N) or None for zeros -> y (B,L,H,P), final_state (B,H,P,N).
    The state is fp32 (fp64 for fp64 inputs): in bf16, 1.0 times 0.999 stays 1.0 for ever.
    """
    state = _initial_state(x, B, initial_state)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A).to(state.dtype)  # (B, H)
        update = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay[..., None, None] * state + update
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t].to(state.dtype)))
    y = torch.stack(outputs, 1).to(x.dtype)  # (B, L, H, P)
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x
    return y, state


def ssd_chunked(x, dt, A, B, C, D=None, initial_state=None, chunk=256):
    """The same function as `ssd_recurrent`, by matrix products over chunks of Q frames.

    Unrolled over a chunk, the recurrence is a product with a lower-triangular matrix:

        y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) (dt_j x_j)   +   exp(a_i) S_in C_i

    with a = cumsum(dt A) inside the chunk and S_in the state that enters it. The first term looks
    like attention without a softmax; the second is how the past arrives. Each of the L/Q
    chunks costs Q^2 P + Q^2 N / H + 2 Q P N + P N multiply-adds a head: linear in L. (SSD paper,
    sec. 6 and listing 1)

    Any L: the last chunk is filled up with dt = 0, at which the state neither fades nor takes in.
    """
    L, H, Q = *x.shape[1:3], min(chunk, x.shape[1])
    state = _initial_state(x, B, initial_state)
    if missing := -L % Q:
        x, dt, B, C = (F.pad(v, (0, 0) * (v.ndim - 2) + (0, missing)) for v in (x, dt, B, C))

    # Heads before frames: every product below is then one of matrices that lie whole in memory.
    u = rearrange(x * dt[..., None].to(x.dtype), "b (c q) h p -> b c h q p", q=Q).contiguous()
    B, C = (rearrange(v, "b (c q) n -> b c q n", q=Q) for v in (B, C))
    # The decays are exponentials of sums: they are formed in fp32 and inside a chunk only, because
    # a sum over the whole sequence would lose the digits of the small differences that matter.
    a = rearrange(dt.to(state.dtype) * A, "b (c q) h -> b c h q", q=Q).contiguous().cumsum(-1)

    # 1. Inside each chunk: y_i = sum_j M_ij u_j, M_ij = exp(a_i - a_j) (C_i . B_j). The mask enters
    #    before the exponential: above the diagonal a_i - a_j > 0 may overflow, and inf * 0 would
    #    poison the gradient.
    future = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (a[..., :, None] - a[..., None, :]).masked_fill_(future, -torch.inf).exp()
    M = decay.to(x.dtype) * (C @ B.mT)[:, :, None]  # (B, c, H, Q, Q)
    y = M @ u  # (B, c, H, Q, P)

    # 2. What each chunk adds to the state: the sum of its outer products, faded to its end.
    faded = u * torch.exp(a[..., -1:] - a)[..., None].to(u.dtype)
    added = rearrange(faded, "b c h q p -> b c (h p) q") @ B
    added = rearrange(added, "b c (h p) n -> b c h p n", h=H)  # (B, c, H, P, N)

    # 3. Pass the state along the chunks: the recurrence again, L/Q steps instead of L.
    whole, entering = torch.exp(a[..., -1])[..., None, None], []  # (B, c, H, 1, 1)
    for fade, new in zip(whole.unbind(1), added.unbind(1)):
        entering.append(state)  # (B, H, P, N)
        state = fade * state + new

    # 4. What the entering state says: read it through C, faded from the chunk's beginning.
    read = C @ rearrange(torch.stack(entering, 1).to(C.dtype), "b c h p n -> b c n (h p)")
    read = rearrange(read, "b c q (h p) -> b c h q p", h=H)  # (B, c, H, Q, P)
    y = y + read * torch.exp(a)[..., None].to(y.dtype)

    y = rearrange(y, "b c h q p -> b (c q) h p")[:, :L]
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x[:, :L]
    return y, state


def ssd(x, dt, A, B, C, D=None, initial_state=None, chunk=256):
    """`ssd_chunked`, or the same as Triton kernels where those can run (`ssd_kernel.obstacle`)."""
    function = ssd_kernel.ssd if ssd_kernel.available(x) else ssd_chunked
    return function(x, dt, A, B, C, D, initial_state, chunk)


def _initial_state(x, B, state):
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is not None:
        return state.to(dtype)
    return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=dtype)


# ------------------------------------------------------------------------------------------------
# 2  The layers
#
# Each maps (B, L, D) to (B, L, D) in two ways that share their parameters and agree:
#   forward(h, context)      -> y, state   a whole sequence from its beginning, and what to remember
#   step(h, state, position) -> y          one more frame (B, D); the state is updated in place


class Context(NamedTuple):
    """What a layer may look at besides its own sequence."""

    text: Tensor | None  # (B, S, D), what cross-attention reads
    text_mask: Tensor | None  # (B, S), True at real text
    mask: Tensor | None  # (B, L), True at real positions of the sequence; None: all are


class RMSNorm(nn.RMSNorm):
    """Computed in the parameters' fp32 also where autocast hands it bf16."""

    def forward(self, h):
        return super().forward(h.to(self.weight.dtype)).to(h.dtype)


class MambaState(NamedTuple):
    conv: Tensor  # (B, d_conv - 1, H P + 2 N), the convolution's last inputs
    ssm: Tensor  # (B, H, P, N), fp32


class Mamba2(nn.Module):
    """Mamba-2 (SSD paper, sec. 7): projection, short convolution, SSD, gate, norm, projection."""

    def __init__(self, config):
        super().__init__()
        self.chunk, self.headdim = config.chunk, config.headdim
        self.d_inner = config.expand * config.d_model
        self.d_state, heads = config.d_state, self.d_inner // config.headdim
        self.sizes = [self.d_inner, self.d_inner + 2 * self.d_state, heads]  # z | x B C | dt
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(self.sizes[1], self.sizes[1], config.d_conv, groups=self.sizes[1])
        # dt starts log-uniform in [1e-3, 1e-1], -A uniform in [1, 16]: memories of about one to a
        # thousand frames, so that there is something for every time scale to grow from.
        dt_range, A_range = (1e-3, 1e-1), (1, 16)
        if config.init == "memory":
            # With few heads and a small N hardly any head remembers the text when the music begins,
            # and what B and C would read of it is noise: C . B is as often negative as positive.
            # Slow decays, C . B > 0 (biases of one, as in Mamba-3, arXiv 2603.15569) and a
            # convolution near the identity make every head a running mean of the past instead.
            dt_range, A_range = (1e-2, 1), (1e-2, 1)
            self.conv1d.weight.data.mul_(0.3)[:, 0, -1] += 1
            self.conv1d.bias.data[self.d_inner :] = 1
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(heads, *dt_range)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_range).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)
        self.core = mamba_step  # or the same, compiled: see `prepared`

    def forward(self, h, context):
        z, xBC, dt = self.in_proj(h).split(self.sizes, -1)
        # Padding must leave no trace: nothing of it enters the convolution, and no time passes
        # (dt = 0), so that the state neither fades nor takes anything in.
        mask = None if context.mask is None else context.mask[..., None]  # (B, L, 1)
        xBC = xBC if mask is None else xBC * mask
        xBC = F.pad(
            xBC, (0, 0, self.conv1d.kernel_size[0] - 1, 0)
        )  # causal: zeros before, not after
        conv_state = xBC[:, 1 - self.conv1d.kernel_size[0] :].clone()
        xBC = F.silu(self.conv1d(xBC.mT).mT)  # (B, L, H P + 2 N)
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], -1)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # (B, L, H), fp32
        dt = dt if mask is None else dt * mask
        x = rearrange(x, "b l (h p) -> b l h p", p=self.headdim)
        A = -torch.exp(self.A_log)
        y, ssm = ssd(x, dt, A, B, C, self.D, chunk=self.chunk)
        y = self.norm(rearrange(y, "b l h p -> b l (h p)") * F.silu(z))
        return self.out_proj(y), MambaState(conv_state, ssm)

    def step(self, h, state, position):
        core = ssd_kernel.step if ssd_kernel.available(state.ssm[..., 0]) else self.core
        y = core(
            self.in_proj(h), *state, self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias,
            self.A_log, self.D, self.norm.weight, self.norm.eps,
        )  # fmt: skip
        return self.out_proj(y)


def mamba_step(zxBCdt, conv, ssm, weight, bias, dt_bias, A_log, D, norm, eps):
    """One frame through the middle of `Mamba2`, from what in_proj gave (B, 2 H P + 2 N + H) to what
    out_proj takes (B, H P). conv (B, d_conv - 1, H P + 2 N) and ssm (B, H, P, N), which make up a
    MambaState, are updated in place. `ssd_kernel.step` is the same for GPUs."""
    H, P, N = ssm.shape[1:]
    z, xBC, dt = zxBCdt.split([H * P, H * P + 2 * N, H], -1)
    window = torch.cat([conv, xBC[:, None]], 1)  # (B, d_conv, H P + 2 N)
    xBC = F.silu((window * weight.T).sum(1) + bias)
    x, B, C = xBC.split([H * P, N, N], -1)
    x = rearrange(x, "b (h p) -> b h p", p=P)
    dt = F.softplus(dt + dt_bias).to(ssm.dtype)  # (B, H)
    decay = torch.exp(-dt * torch.exp(A_log))
    u = x.to(dt.dtype) * dt[..., None]
    ssm.mul_(decay[..., None, None]).addcmul_(u[..., None], B[:, None, None].to(u.dtype))
    # Not as a matrix product: those with one column use a fraction of a CPU's bandwidth.
    y = (ssm * C[:, None, None].to(u.dtype)).sum(-1).to(x.dtype)
    conv.copy_(window[:, 1:])
    y = rearrange(y + D[:, None] * x, "b h p -> b (h p)") * F.silu(z)
    return F.rms_norm(y.to(norm.dtype), norm.shape, norm, eps).to(zxBCdt.dtype)


def log_uniform(count, low, high):
    return torch.exp(torch.empty(count).uniform_(math.log(low), math.log(high)))


def inverse_softplus(v):
    return v + torch.log(-torch.expm1(-v))


class Empty(NamedTuple):
    """The state of a layer that looks at one frame only."""


class FeedForward(nn.Module):
    """Mixes channels, not time: D -> 2 D -> D with a GELU."""

    def __init__(self, config):
        super().__init__()
        hidden = config.ff_mult * config.d_model
        self.up, self.down = nn.Linear(config.d_model, hidden), nn.Linear(hidden, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def step(self, h, state=None, position=None):
        return self.down(self.dropout(F.gelu(self.up(h))))

    def forward(self, h, context):
        return self.step(h), Empty()


class EinFFT(nn.Module):
    """The channel mixer of the original SiMBA (arXiv 2403.15360, sec. 3.1): two complex
    block-diagonal layers between a Fourier transform and its inverse. There the transform runs over
    the sequence too; a language model must not see the future, so here it runs over the channels of
    one frame, blocks by block size. ReLU on real and imaginary part, soft threshold 0.01."""

    BLOCKS = 4

    def __init__(self, config):
        super().__init__()
        size = config.d_model // self.BLOCKS
        self.weights = nn.Parameter(
            torch.randn(2, self.BLOCKS, size, size, 2) / math.sqrt(2 * size)
        )
        self.biases = nn.Parameter(torch.zeros(2, self.BLOCKS, size, 2))
        self.dropout = nn.Dropout(config.dropout)

    def step(self, h, state=None, position=None):
        w, b = torch.view_as_complex(self.weights), torch.view_as_complex(self.biases)
        f = torch.fft.fft2(h.to(w.real.dtype).unflatten(-1, (self.BLOCKS, -1)), norm="ortho")
        f = torch.einsum("...kd,kde->...ke", f, w[0]) + b[0]
        f = self.dropout(F.relu(torch.view_as_real(f)))
        f = torch.einsum("...kd,kde->...ke", torch.view_as_complex(f), w[1]) + b[1]
        f = torch.view_as_complex(F.softshrink(torch.view_as_real(f), 0.01))
        return torch.fft.ifft2(f, norm="ortho").real.flatten(-2).to(h.dtype)

    def forward(self, h, context):
        return self.step(h), Empty()


class KVCache(NamedTuple):
    k: Tensor  # (B, heads, capacity, D / heads)
    v: Tensor


class SelfAttention(nn.Module):
    """Multi-head attention: the mixer that the SSD is compared with. Its state grows."""

    def __init__(self, config, causal=True):
        super().__init__()
        self.heads, self.causal = config.attention_heads, causal
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, h, context):
        q, k, v = rearrange(self.qkv(h), "b l (s h d) -> s b h l d", s=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(rearrange(y, "b h l d -> b l (h d)")), KVCache(k, v)

    def step(self, h, state, position):
        q, k, v = rearrange(self.qkv(h), "b (s h d) -> s b h d", s=3, h=self.heads)
        rows = torch.arange(len(h), device=h.device)
        state.k[rows, :, position], state.v[rows, :, position] = k, v
        seen = torch.arange(state.k.shape[2], device=h.device) <= position[:, None]  # (B, capacity)
        y = F.scaled_dot_product_attention(q[:, :, None], state.k, state.v, seen[:, None, None])
        return self.out(y.flatten(1))


class TextCache(NamedTuple):
    k: Tensor  # (B, heads, S, D / heads)
    v: Tensor
    mask: Tensor  # (B, 1, 1, S)


class CrossAttention(nn.Module):
    """Every frame looks at the whole text. Keys and values are made once; the state is theirs."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.attention_heads
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.kv = nn.Linear(config.d_model, 2 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, h, context):
        k, v = rearrange(self.kv(context.text), "b s (n h d) -> n b h s d", n=2, h=self.heads)
        state = TextCache(k, v, context.text_mask[:, None, None])
        return self._look(h, state), state

    def step(self, h, state, position):
        return self._look(h[:, None], state)[:, 0]

    def _look(self, h, state):
        q = rearrange(self.q(h), "b l (h d) -> b h l d", h=self.heads)
        y = F.scaled_dot_product_attention(q, state.k, state.v, attn_mask=state.mask)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


# ------------------------------------------------------------------------------------------------
# 3  The model

VARIANTS = {  # SSMTTM, Fig. 1 (a)-(d): the layers of one block
    "mamba": (Mamba2, Mamba2),
    "simba": (Mamba2, FeedForward),
    "cross-simba": (Mamba2, CrossAttention, FeedForward),
    "transformer": (SelfAttention, CrossAttention, FeedForward),
}


@dataclass
class LMConfig:
    """The language model's shape. The defaults are the paper's."""

    variant: str = "simba"  # mamba, simba, cross-simba or transformer
    codebooks: int = 1  # codebooks modelled: 1 (the two-stage system's first) or 9 (single-stage)
    blocks: int = 24  # the paper's RQ3 scales this down: 24, 12, 6
    d_model: int = 1024  # D, width of the residual stream
    d_state: int = 512  # N, columns of each head's state
    headdim: int = 64  # P, rows of each head's state
    expand: int = 2  # Mamba-2 works on expand * D channels, in expand * D / P heads
    d_conv: int = 4  # taps of Mamba-2's convolution
    init: str = "mamba2"  # how an SSD starts: as its authors have it, or memory: a running mean
    chunk: int = 256  # Q, frames in a chunk of the SSD: changes speed and memory, not the result
    ff_mult: int = 2  # hidden width of the feed-forward layer, in units of D
    attention_heads: int = 8  # heads of self- and cross-attention
    mixer: str = "ff"  # ff, or einfft: the channel mixer of simba and cross-simba
    d_text: int = 768  # width of the text encoder's output
    dropout: float = 0.3  # after every layer and inside the feed-forward
    codebook_size: int = 1024  # codes; the id codebook_size is the special token: begin, "not yet"
    clock: str = "text"  # where positions count from: text, music, or beat: music, and see `_beats`
    trained_frames: int = 2584  # positions beyond this hold the last one (see `_positions`)

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: choose {', '.join(VARIANTS)}")
        if self.mixer not in ("ff", "einfft"):
            raise ValueError(f"unknown mixer {self.mixer!r}: choose ff or einfft")
        if self.init not in ("mamba2", "memory"):
            raise ValueError(f"unknown init {self.init!r}: choose mamba2 or memory")
        if self.clock not in ("text", "music", "beat"):
            raise ValueError(f"unknown clock {self.clock!r}: choose text, music or beat")
        if self.mixer == "einfft" and self.variant not in ("simba", "cross-simba"):
            raise ValueError(f"--mixer einfft goes with simba and cross-simba, not {self.variant}")
        if self.d_conv < 2:
            raise ValueError(f"d_conv must be at least 2, not {self.d_conv}")
        if self.headdim < 1 or self.expand * self.d_model % self.headdim:
            raise ValueError(f"headdim {self.headdim} must divide {self.expand * self.d_model}")
        if self.attention_heads < 1 or self.d_model % self.attention_heads:
            raise ValueError(f"{self.attention_heads} attention heads must divide {self.d_model}")

    @property
    def prefix(self):
        """Whether the text comes before the music (True) or through cross-attention (False)."""
        return self.variant in ("mamba", "simba")


class Block(nn.Module):
    """h <- h + dropout(layer(norm(h))), for each layer of the variant in turn."""

    def __init__(self, config):
        super().__init__()
        kinds = VARIANTS[config.variant]
        if config.mixer == "einfft":
            kinds = tuple(EinFFT if kind is FeedForward else kind for kind in kinds)
        self.layers = nn.ModuleList(kind(config) for kind in kinds)
        self.norms = nn.ModuleList(RMSNorm(config.d_model, eps=1e-5) for _ in kinds)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h, context):
        states = []
        for layer, norm in zip(self.layers, self.norms):
            y, state = layer(norm(h), context)
            h = h + self.dropout(y)
            states.append(state)
        return h, states

    def step(self, h, states, position):
        for layer, norm, state in zip(self.layers, self.norms, states):
            h = h + layer.step(norm(h), state, position)
        return h


def sinusoids(position, width, dtype=torch.float32):
    """positions (...) -> (..., width): cosines, then sines, of periods 2 pi to 20,000 pi."""
    exponent = torch.arange(width // 2, device=position.device, dtype=dtype) / (width // 2 - 1)
    angle = position[..., None].to(dtype) / 10000**exponent
    return torch.cat([angle.cos(), angle.sin()], -1)


class LMState(NamedTuple):
    """All that the model remembers of what it read."""

    blocks: list  # for each block, for each layer: MambaState, KVCache, TextCache or Empty
    position: Tensor  # (B,), of the next frame, see LMConfig.clock; padding does not count
    tempo: Tensor  # (B,), bpm that the text names, 0 where it names none


class MusicLM(nn.Module):
    """A language model over codec tokens, conditioned on text.

    `lm(codes (B,K,L), text (B,S,d_text), text_mask (B,S), tempo (B,)) -> logits (B,K,L,V)`, where
    `logits[:, k, t]` predicts `codes[:, k, t]` from the text and earlier tokens. The begin token,
    the shift and the delay pattern are the model's own business. The tempo is only for those that
    count beats (`_beats`), and may be left out.
    """

    PERIODS = (1 / 4, 1 / 2, 1, 2, 3, 4)  # beats: from a sixteenth note to a bar

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        D, V = config.d_model, config.codebook_size + 1
        self.text_proj, self.text_norm = nn.Linear(config.d_text, D), nn.LayerNorm(D)
        self.embeddings = nn.ModuleList(nn.Embedding(V, D) for _ in range(config.codebooks))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.heads = nn.ModuleList(nn.Linear(D, V, bias=False) for _ in range(config.codebooks))
        if config.clock == "beat":
            self.beat_proj = nn.Linear(2 * len(self.PERIODS) + 1, D, bias=False)
            self.beat_proj.weight.data.zero_()  # at first, the music's clock is all there is
            # Not made anew at every step: a CUDA graph allows no copies from the host.
            self.register_buffer("periods", torch.tensor(self.PERIODS), persistent=False)
        self.recompute = 0  # in training, so many blocks keep nothing but their input
        # What a layer adds to the residual stream shrinks with depth, as in GPT-2 and Mamba.
        depth = config.blocks * len(VARIANTS[config.variant])
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "out.weight", "down.weight")):
                parameter.data /= math.sqrt(depth)

    def forward(self, codes, text, text_mask, tempo=None):
        K, L = codes.shape[1:]
        h, _ = self._read(self.delay(codes)[:, :, : L + K - 1], text, text_mask, tempo)
        logits = torch.stack([head(h) for head in self.heads], 1)  # (B, K, L + K - 1, V)
        if K == 1:
            return logits
        return torch.stack([logits[:, k, k : k + L] for k in range(K)], 1)  # (B, K, L, V)

    def delay(self, codes):
        """(B, K, L) -> (B, K, L + K): codebook k (from 0) is shifted right by k + 1, behind the
        special token. Reading column s, the model predicts code (k, s - k) for every k: a frame's
        codebooks come one after the other, each knowing the coarser ones."""
        B, K, L = codes.shape
        columns = codes.new_full((B, K, L + K), self.config.codebook_size)
        for k in range(K):
            columns[:, k, k + 1 : k + 1 + L] = codes[:, k]
        return columns

    def _read(self, columns, text, text_mask, tempo):
        """Reads text and columns (B, K, L) in parallel -> hidden (B, L, D) and the LMState."""
        tempo = text.new_zeros(len(text)) if tempo is None else tempo
        text = self.text_norm(self.text_proj(text))  # (B, S, D)
        h = self._embed(columns)
        B, L = h.shape[:2]
        mask = None
        if self.config.prefix:
            # Left padding, whatever side it came on: the text has to end where the music begins.
            text_mask, order = text_mask.sort(dim=1, stable=True)
            text = text.gather(1, order[..., None].expand_as(text))
            h = torch.cat([text, h], 1)
            mask = torch.cat([text_mask, text_mask.new_ones(B, L)], 1)
            if self.config.clock == "text":
                position = (mask.cumsum(1) - 1).clamp(min=0)
            else:  # the text has negative ones, and a beat's place in time does not depend on it
                position = torch.arange(-text.shape[1], L, device=h.device).expand(B, -1)
        else:
            position = torch.arange(L, device=h.device).expand(B, L)
        read = position[:, -1] + 1
        h = h + self._positions(position, tempo[:, None]).to(h.dtype)
        context = Context(text, text_mask, mask)
        states = []
        for i, block in enumerate(self.blocks):
            if self.training and i < self.recompute:
                h, state = checkpoint(block, h, context, use_reentrant=False)
            else:
                h, state = block(h, context)
            states.append(state)
        return h[:, -L:], LMState(states, read, tempo)

    def _embed(self, columns):
        """(B, K, ...) -> (B, ..., D): the sum of the codebooks' embeddings."""
        return sum(embed(columns[:, k]) for k, embed in enumerate(self.embeddings))

    def _positions(self, position, tempo):
        """Sinusoids (..., D). Positions past the longest trained one stay there: a sinusoid that
        training never showed derails the model, a familiar one does not."""
        known = position.clamp(max=self.config.trained_frames - 1)
        h = sinusoids(known, self.config.d_model, self.text_norm.weight.dtype)
        return h + self._beats(position, tempo) if self.config.clock == "beat" else h

    def _beats(self, position, tempo):
        """Where in the beat and in the bar a frame is, if the text says how many beats a minute:
        positions (...) and bpm, 0 for unknown -> (..., D). A small model learns a number's sense
        slowly, and keeping time even of a beat it has heard is hard for it; this is a metronome.
        It starts with the music, and never ends: beats are as familiar after an hour as at first.
        """
        beats = position * (tempo / (60 * FRAME_RATE))
        angle = 2 * math.pi * (beats[..., None] / self.periods).frac()
        waves = torch.cat([angle.cos(), angle.sin(), torch.ones_like(angle[..., :1])], -1)
        heard = (tempo > 0) & (position >= 0)
        return self.beat_proj((waves * heard[..., None]).to(self.beat_proj.weight.dtype))

    def prefill(self, text, text_mask, tempo=None, codes=None, room=0):
        """Reads the text, the begin token and the codes (B, K, T) so far, if any
        -> logits (B, K, V) of the next column, and the state to `step` from. room: how many steps
        are to follow, for the layers whose state is a cache."""
        if codes is None:
            codes = torch.empty(len(text), len(self.heads), 0, dtype=torch.long, device=text.device)
        if self.config.prefix and len(text) == 1:
            text, text_mask = text[:, text_mask[0]], text_mask[:, text_mask[0]]
        h, state = self._read(self.delay(codes)[:, :, : codes.shape[2] + 1], text, text_mask, tempo)
        for layers in state.blocks:
            for i, layer in enumerate(layers):
                if isinstance(layer, KVCache):
                    layers[i] = KVCache(*(F.pad(v, (0, 0, 0, room)) for v in layer))
        return torch.stack([head(h[:, -1]) for head in self.heads], 1), state

    def step(self, column, state):
        """column (B, K), the tokens just chosen -> logits (B, K, V) of the next; updates state."""
        h = self._embed(column)
        h = h + self._positions(state.position, state.tempo).to(self.text_norm.weight.dtype)
        for block, layer_states in zip(self.blocks, state.blocks):
            h = block.step(h, layer_states, state.position)
        state.position.add_(1)
        return torch.stack([head(h) for head in self.heads], 1)


# ------------------------------------------------------------------------------------------------
# 4  The text


class TextEncoder(nn.Module):
    """Captions -> T5's last hidden state. One class, two sizes: the paper's frozen Flan-T5 Base
    from the hub, or a small T5 with its own tokenizer. Either is frozen, or trained along.

    `encoder(["slow piano waltz", ""]) -> text (B, S, d_text), mask (B, S), tempo (B,)`, S the
    longest caption's tokens with the closing </s>; the empty string, guidance's unconditional half,
    is </s> alone. The tempo is the bpm that a caption names, 0 if none.
    """

    TEMPO = re.compile(r"(\d+(?:\.\d+)?) ?(?:bpm|beats (?:per|a) minute)", re.IGNORECASE)

    def __init__(self, tokenizer, encoder, name, max_tokens):
        super().__init__()
        self.tokenizer, self.encoder, self.name = tokenizer, encoder, name
        self.max_tokens = max_tokens  # longer captions are cut
        self.fill = 0  # a batch of fewer tokens is filled up with </s>; if not 0, all of S is read

    @classmethod
    def small(cls, tokenizer_json: str, d_model=128, layers=2, max_tokens=128):
        """A new T5 of `layers` blocks for a tokenizer given as the text of its tokenizer.json."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_json), pad_token="<pad>", eos_token="</s>"
        )
        config = T5Config(
            vocab_size=len(tokenizer), d_model=d_model, d_kv=32, d_ff=2 * d_model,
            num_layers=layers, num_heads=d_model // 32, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return cls(tokenizer, T5EncoderModel(config), "small", max_tokens)

    @classmethod
    def pretrained(cls, name="google/flan-t5-base", max_tokens=256):
        """A published encoder by its name on the hub, or from a folder; ValueError if neither."""
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            tokenizer, encoder = (
                AutoTokenizer.from_pretrained(name),
                T5EncoderModel.from_pretrained(name),
            )
        except Exception as error:  # the hub's client raises many kinds; all mean the same here
            raise ValueError(
                f"the text encoder {name} could not be loaded ({type(error).__name__}): it needs "
                f"https://huggingface.co/{name} once, or give a folder that holds its files"
            ) from None
        return cls(tokenizer, encoder.requires_grad_(False).eval(), name, max_tokens)

    @property
    def d_text(self):
        return self.encoder.config.d_model

    @property
    def trained(self):
        """Whether it learns with the language model."""
        return any(p.requires_grad for p in self.parameters())

    def too_long(self, caption):
        return len(self.tokenizer(caption).input_ids) > self.max_tokens

    def forward(self, captions: list[str], multiple=1):
        """multiple: S is rounded up to a multiple of this (at most to max_tokens)."""
        batch = self.tokenizer(
            captions, truncation=True, max_length=self.max_tokens, return_tensors="pt",
            padding=True, pad_to_multiple_of=min(multiple, self.max_tokens),
        ).to(self.encoder.device)  # fmt: skip
        ids, mask = batch.input_ids, batch.attention_mask
        if (missing := self.fill - ids.shape[1]) > 0:
            ids = F.pad(ids, (0, missing), value=self.tokenizer.eos_token_id)
            mask = F.pad(mask, (0, missing))
        # T5 looks at the caption alone; with `fill`, the language model looks at all that follows.
        text = self.encoder(input_ids=ids, attention_mask=mask)[0]
        named = [self.TEMPO.search(caption) for caption in captions]
        tempo = torch.tensor([float(n[1]) if n else 0.0 for n in named], device=text.device)
        return text, mask.bool() | (self.fill > 0), tempo

    def pooled(self, captions):
        """-> (B, d_text), the mean over a caption's tokens; of the empty string that of </s>."""
        text, mask, _ = self(captions)
        mask = mask[..., None].to(text.dtype)
        return (text * mask).sum(1) / mask.sum(1)


# ------------------------------------------------------------------------------------------------
# 5  Sampling

LARGE = 50_000_000  # parameters, from where on a step of one sample keeps the machine busy
LANES = 4  # samples that a smaller model makes at once


def prepared(lm, device):
    """The model on its device, as it samples best. A step reads every weight and does little else,
    so the matrices of a large model become bf16, half the bytes, where the hardware multiplies
    those. Vectors, convolutions and all states stay fp32. On a CPU with a C++ compiler the middle
    of Mamba-2 is compiled (it takes seconds, once), to pass over the states once, not four times.
    """
    device = torch.device(device)
    if is_large(lm):
        core = mamba_step
        if device.type == "cpu" and any(map(shutil.which, ("g++", "clang++"))):
            core = torch.compile(mamba_step, dynamic=False)
        for layer in lm.modules():
            if isinstance(layer, Mamba2):
                layer.core = core
            if isinstance(layer, nn.Linear) and multiplies_bf16(device):
                layer.weight.data = layer.weight.data.bfloat16()
    return lm.to(device)


def is_large(lm):
    return sum(p.numel() for p in lm.parameters()) >= LARGE


def multiplies_bf16(device):
    has = torch.cpu._is_avx512_bf16_supported
    return device.type == "cuda" or device.type == "cpu" and has()


def precision(lm):
    """The autocast that a `prepared` model runs under: bf16 where its matrices are."""
    weight = lm.heads[0].weight
    half = weight.dtype == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def guided(logits, guidance):
    """Classifier-free guidance: logits of both halves (2 B, ...) -> (B, ...)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def sample_tokens(logits, uniform, temperature=1.2, top_k=250, top_p=1.0):
    """One token per row by inverting the cumulative distribution.

    logits (..., V), uniform (...) in [0, 1) -> tokens (...). The last entry of the vocabulary, the
    special token, is never chosen. Keeps the top_k likeliest tokens, and of those the fewest whose
    probability reaches top_p.
    """
    logits = logits[..., :-1].float() / temperature
    p, tokens = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))  # sorted, likeliest first
    p = p * (p.cumsum(-1) - p < top_p)
    cumulative = p.cumsum(-1)
    choice = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice.clamp(max=tokens.shape[-1] - 1)).squeeze(-1)


@torch.inference_mode()
def generate(
    lm, encoder, prompts, frames, seeds, *, negative="", guidance=3.0, temperature=1.2, top_k=250,
    top_p=1.0, codes=None, block=64, lanes=None,
) -> Iterator[Tensor]:  # fmt: skip
    """Samples `frames` frames for each prompt; yields blocks (R, K, up to `block`) on the way.

    prompts: R strings; seeds: R integers; negative: the prompt of guidance's other half; codes
    (R, K, T): music to continue, which is not yielded again. Memory does not grow with `frames`
    (but for the Transformer, whose cache does).

    Classifier-free guidance: logits = without + guidance (with - without the prompt), both halves
    in one batch (SSMTTM IV-A).

    A sample depends on its prompt and its seed alone, to the last bit, however many others are made
    beside it: a matrix product of another height rounds differently, so the batch always runs in
    groups of `lanes`, the last filled up, and every prompt is read by itself. (By default LANES, or
    one where the model is large.)
    """
    lanes = lanes or (1 if is_large(lm) else LANES)
    if codes is None:
        codes = torch.empty(len(prompts), len(lm.heads), 0, dtype=torch.long)
    options = dict(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    groups = [
        _generate_lanes(
            lm, encoder, prompts[i : i + lanes], negative, frames, seeds[i : i + lanes],
            codes[i : i + lanes], block, lanes, **options,
        )
        for i in range(0, len(prompts), lanes)
    ]  # fmt: skip
    for blocks in zip(*groups):
        yield torch.cat(blocks)


def _generate_lanes(
    lm, encoder, prompts, negative, frames, seeds, codes, block, lanes,
    guidance, temperature, top_k, top_p,
):  # fmt: skip
    rows, K, device = len(prompts), len(lm.heads), next(lm.parameters()).device
    codes, fill = codes.to(device), lanes - rows
    room, step = frames + K - 1, None
    width = 1 if lm.config.prefix else encoder.max_tokens  # cross-attention sees one width

    def read(prompt, row):
        with precision(lm):
            return lm.prefill(*encoder([prompt], width), codes[row : row + 1], room)

    first = [read(prompt, row) for row, prompt in enumerate(prompts)]
    first += first[:1] * fill
    if guidance != 1:
        unread = (
            [read(negative, row) for row in range(rows)]
            if codes.shape[2]
            else [read(negative, 0)] * rows
        )
        first += unread + unread[:1] * fill
    logits = torch.cat([logits for logits, _ in first])  # (lanes or 2 lanes, K, V)
    state = _stack([state for _, state in first])

    # Columns that are (partly) known before sampling begins: the fine codebooks of the music to
    # continue lag behind its coarse ones, and of nothing at all they are "not yet".
    known = lm.delay(codes)[:, :, codes.shape[2] + 1 :]  # (rows, K, K - 1)
    known = torch.cat([known, known[:1].expand(fill, -1, -1)])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    columns, done = [], []
    for s in range(frames + K - 1):
        if s % block == 0:
            uniform = torch.stack([torch.rand(block, K, generator=g) for g in generators])
            uniform = torch.cat([uniform, uniform[:1].expand(fill, -1, -1)]).to(device)
        if guidance != 1:
            logits = guided(logits, guidance)
        column = sample_tokens(
            logits, uniform[:, s % block], temperature, top_k, top_p
        )  # (lanes, K)
        if s < K - 1:
            column[:, s + 1 :] = known[:, s + 1 :, s]
        columns = (columns + [column])[-K:]
        if len(columns) == K:  # frame s - K + 1 has all its codebooks now
            done.append(torch.stack([columns[k][:rows, k] for k in range(K)], 1))
        if len(done) == block or s == frames + K - 2:
            yield torch.stack(done, 2).cpu()
            done = []
        if s < frames + K - 2:
            column = column if guidance == 1 else torch.cat([column, column])
            with precision(lm):
                step = step or _stepper(lm, column, state)
                logits = step(column)


def _stepper(lm, column, state):
    """lm.step with this state, as a function of the column; on a GPU it is recorded as a CUDA graph
    and replayed, one launch instead of a few hundred."""
    if column.device.type != "cuda":
        return lambda column: lm.step(column, state)
    column = column.clone()  # a graph reads and writes the same memory at every replay
    remembered = [state.position, *(v for block in state.blocks for layer in block for v in layer)]
    before = [v.clone() for v in remembered]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        lm.step(column, state)  # kernels are compiled and libraries woken up outside the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = lm.step(column, state)
    for v, old in zip(remembered, before):
        v.copy_(old)

    def replay(new):
        column.copy_(new)
        graph.replay()
        return logits

    return replay


def _stack(states):
    """Joins the LMStates of single rows into that of a batch."""
    blocks = [
        [type(layer[0])(*map(torch.cat, zip(*layer))) for layer in zip(*block)]
        for block in zip(*(state.blocks for state in states))
    ]
    position, tempo = (torch.cat(v) for v in zip(*(state[1:] for state in states)))
    return LMState(blocks, position, tempo)


# ------------------------------------------------------------------------------------------------
# 6  Checkpoints: a folder with config.json, model.safetensors and, if the encoder is small, its
#    tokenizer.json; or the file that the paper's authors published (`authors.py`)


def save_checkpoint(folder, lm, encoder, extra=None, files=None, dtype=None, weights=None):
    """Writes a checkpoint folder under a temporary name and renames it: it is there whole or not.

    extra: more entries for config.json; files: {name: {key: tensor}} written beside the model as
    safetensors; dtype: the weights' type on disk, None for their own; weights: the language model's
    state_dict, where it is not its own.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    _remove(new)
    new.mkdir(parents=True)
    text = {"name": encoder.name, "stored": encoder.trained or encoder.name == "small"}
    text |= {"fill": encoder.fill} if encoder.fill else {}
    config = {"model": asdict(lm.config), "text": text, **(extra or {})}
    weights = {f"lm.{k}": v for k, v in (weights or lm.state_dict()).items()}
    if encoder.name == "small":
        t5 = encoder.encoder.config
        text |= dict(d_model=t5.d_model, layers=t5.num_layers, max_tokens=encoder.max_tokens)
        (new / "tokenizer.json").write_text(encoder.tokenizer.backend_tokenizer.to_str())
    if text["stored"]:
        weights |= {f"text.{k}": v for k, v in encoder.encoder.state_dict().items()}
        weights.pop("text.encoder.embed_tokens.weight", None)  # another name of text.shared.weight
    weights = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in weights.items()}
    for name, tensors in {"model.safetensors": weights, **(files or {})}.items():
        save_file(tensors, new / name)
    (new / "config.json").write_text(json.dumps(config, indent=1))
    while new.exists():
        if folder.exists():
            _remove(old)
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():  # else another process, reading, has just put the old one back
                raise
    _remove(old)


def read_config(folder) -> dict:
    """A checkpoint's config.json. ValueError, one sentence, if there is none or it is broken."""
    if is_authors(folder):
        return read_authors(folder)[0]
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # killed between the two renames of save_checkpoint
        with contextlib.suppress(OSError):  # unless another process is between them now
            os.rename(old, folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no checkpoint at {folder}: expected a folder with config.json, as train.py makes, "
            "or the .ckpt file of the paper's authors"
        )
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError:
        raise ValueError(
            f"{folder / 'config.json'} is not valid JSON; the checkpoint is broken"
        ) from None


def load_checkpoint(folder) -> MusicLM:
    """The language model of a checkpoint folder, in fp32 and ready to sample from."""
    known = {field.name for field in fields(LMConfig)}
    values = read_config(folder).get("model")
    if not isinstance(values, dict) or set(values) - known:
        raise ValueError(f"{folder}/config.json does not describe a language model of this program")
    lm = MusicLM(LMConfig(**values))
    file = folder if is_authors(folder) else Path(folder) / "model.safetensors"
    load_weights(lm, file, "lm.")
    return lm.eval()


def load_text_encoder(folder) -> TextEncoder:
    """The text encoder that a checkpoint's language model was trained with."""
    folder, config = Path(folder), read_config(folder).get("text", {})
    if config.get("name") == "small":
        shape = {k: config[k] for k in ("d_model", "layers", "max_tokens")}
        encoder = TextEncoder.small((folder / "tokenizer.json").read_text(), **shape)
    else:
        encoder = TextEncoder.pretrained(config.get("name", "google/flan-t5-base"))
    if config.get("stored"):
        load_weights(encoder.encoder, folder / "model.safetensors", "text.")
    encoder.fill = config.get("fill", 0)
    return encoder.eval()


def load_weights(module, file, prefix=""):
    """Fills a module with those tensors of a checkpoint's file whose name begins with `prefix`."""
    tensors = read_tensors(file)
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if "shared.weight" in tensors:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} holds weights of another shape than is expected: {reason}"
        ) from None


def read_tensors(file) -> dict:
    """The tensors of a checkpoint's file. ValueError, one sentence, if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if is_authors(file):
        return read_authors(file)[1]
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is missing, cut short or not a safetensors file ({error})"
        ) from None


def _remove(path):
    if Path(path).exists():
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------
# 7  The command line


def add_arguments(parser, config, **defaults):
    """An option for each field of a dataclass; the comment behind the field is its help."""
    source = inspect.getsource(config)
    for field in fields(config):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.M).group(1)
        kind, default = type(field.default), defaults.get(field.name, field.default)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=None if kind is bool else kind,
            default=default,
            **(dict(action=argparse.BooleanOptionalAction) if kind is bool else {}),
            help=f"{comment} [{default}]".replace("%", "%%"),
        )


def read_lines(file):
    """The lines of a text file of prompts. ValueError, one sentence, if it cannot be read."""
    try:
        with open(file, encoding="utf-8") as lines:
            return [line.rstrip("\n") for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} could not be read as prompts, one a line ({error})") from None


def entry(main):
    """Runs a script's main(). What the user can mend comes as a ValueError, and is told in one
    sentence with exit status 2; an interrupt ends with 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
