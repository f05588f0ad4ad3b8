"""The language models: from text and codec tokens so far to the next codec tokens.

A clip of audio is a table of integers, K codebooks by L frames (`codec.py`), 86.13 frames per
second. A language model reads it from left to right and predicts each next frame. Text enters as a
*prefix*, in front of the music, or through *cross-attention*. From the small parts to the whole:

    1  the SSD      `ssd_recurrent` (the definition) and `ssd_chunked` (the same, in parallel)
    2  the layers   Mamba2, FeedForward, EinFFT, SelfAttention, CrossAttention
    3  the model    LMConfig, MusicLM: `forward` over a sequence, `step` over one frame

Letters, the same in every file:

    B batch    L length (frames)    K codebooks    V vocabulary: 1024 codes + 1 special token
    D d_model  H heads              P headdim      N d_state      Q chunk      S length of the text

In the SSD's formulas B and C are the input and output projections ("keys" and "queries"), D is the
weight of the skip connection and S the state.

Papers: the models are those of arXiv 2601.14786 ("SSMTTM" below), Fig. 1. Mamba-2 and the SSD are
from arXiv 2405.21060 ("SSD paper"). The delay pattern is MusicGen's, arXiv 2306.05284.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssd_kernel
from audio import FRAME_RATE
from options import check, option

# ------------------------------------------------------------------------------------------------
# 1  The SSD: a linear recurrence whose state is a matrix
#
# Every head carries a state S, a (P, N) matrix. At each frame the state decays by a scalar and one
# outer product is added; the output reads the state through C:
#
#     S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T          y_t = S_t C_t + D x_t
#
# dt, B and C depend on the input ("selective"). A < 0 and D are learned constants of each head. B
# and C are shared by all heads. (SSD paper, eq. 1 with the discretisation of sec. 2; SSMTTM (2))


def ssd_recurrent(x, dt, A, B, C, D=None, initial_state=None):
    """The definition, a loop over time. Slow and obvious; all else is tested against it.

    x (B,L,H,P), dt (B,L,H) after softplus, A (H,) negative, B and C (B,L,N), D (H,) or None,
    initial_state (B,H,P,N) or None for zeros -> y (B,L,H,P), final_state (B,H,P,N).
    The state is fp32 (fp64 for fp64 inputs): in bf16, 1.0 times 0.999 would stay 1.0 forever.
    """
    state = _initial_state(x, B, initial_state)
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A).to(state.dtype)  # (B, H)
        update = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay[..., None, None] * state + update
        y[:, t] = torch.einsum("bhpn,bn->bhp", state, C[:, t].to(state.dtype))
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x
    return y, state


def ssd_chunked(x, dt, A, B, C, D=None, initial_state=None, chunk=256):
    """The same function as `ssd_recurrent`, by matrix products over chunks of Q frames.

    Unrolled over a chunk, the recurrence is a product with a lower-triangular matrix:

        y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) (dt_j x_j)   +   exp(a_i) S_in C_i

    with a = cumsum(dt A) inside the chunk and S_in the state that enters it. The first term is
    attention without a softmax; the second brings in the past. Each of the L/Q chunks costs
    Q^2 P + Q^2 N / H + 2 Q P N + P N multiply-adds per head: linear in L. (SSD paper, sec. 6 and
    listing 1)

    Any L works: the last chunk is padded with dt = 0, which leaves the state as it is.
    """
    L, H = x.shape[1:3]
    Q = max(1, min(chunk, L))
    state = _initial_state(x, B, initial_state)
    # Matrix products multiply masked entries by zero, and 0 * NaN is NaN. So from the first frame
    # with a NaN or an inf on, zeros are read and NaN is written. Earlier frames see nothing of it.
    bad = ~ssd_kernel.good_frames(x, dt, B, C)  # (B, L)
    spoilt = not x.is_cpu or torch.compiler.is_compiling() or bad.any()  # asking makes a GPU wait
    if spoilt:
        x = x.masked_fill(bad[..., None, None], 0)
        dt, B, C = (v.masked_fill(bad[..., None], 0) for v in (dt, B, C))
    if padding := -L % Q:
        x, dt, B, C = (F.pad(v, (0, 0) * (v.ndim - 2) + (0, padding)) for v in (x, dt, B, C))

    # Heads before frames, so that every product below reads contiguous matrices.
    u = rearrange(x * dt[..., None].to(x.dtype), "b (c q) h p -> b c h q p", q=Q).contiguous()
    B = rearrange(B, "b (c q) n -> b c q n", q=Q)
    C = rearrange(C, "b (c q) n -> b c q n", q=Q)
    # The cumulative sum is in fp32 and inside a chunk only: over the whole sequence it would lose
    # the digits of the small differences that matter.
    a = rearrange(dt.to(state.dtype) * A, "b (c q) h -> b c h q", q=Q).contiguous().cumsum(-1)

    # 1. Inside each chunk: y_i = sum_j M_ij u_j with M_ij = exp(a_i - a_j) (C_i . B_j). The mask
    #    comes before the exponential: above the diagonal a_i - a_j > 0 may overflow, and inf * 0
    #    would make the gradient NaN.
    future = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (a[..., :, None] - a[..., None, :]).masked_fill_(future, -torch.inf).exp()
    M = decay.to(x.dtype) * (C @ B.mT)[:, :, None]  # (B, c, H, Q, Q)
    y = M @ u  # (B, c, H, Q, P)

    # 2. What each chunk adds to the state: the sum of its outer products, decayed to its end.
    decayed = u * torch.exp(a[..., -1:] - a)[..., None].to(u.dtype)
    added = rearrange(decayed, "b c h q p -> b c (h p) q") @ B
    added = rearrange(added, "b c (h p) n -> b c h p n", h=H)  # (B, c, H, P, N)

    # 3. Pass the state along the chunks: the recurrence again, with L/Q steps instead of L.
    chunk_decay = torch.exp(a[..., -1])[..., None, None]  # (B, c, H, 1, 1)
    entering = []
    for decay, new in zip(chunk_decay.unbind(1), added.unbind(1)):
        entering.append(state)  # (B, H, P, N)
        state = decay * state + new

    # 4. What the entering state contributes: read it through C, decayed since the chunk's start.
    if entering:
        read = C @ rearrange(torch.stack(entering, 1).to(C.dtype), "b c h p n -> b c n (h p)")
        read = rearrange(read, "b c q (h p) -> b c h q p", h=H)  # (B, c, H, Q, P)
        y = y + read * torch.exp(a)[..., None].to(y.dtype)

    y = rearrange(y, "b c h q p -> b (c q) h p")[:, :L]
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x[:, :L]
    if spoilt:
        y = y.masked_fill(bad[..., None, None], torch.nan)
        state = state.masked_fill(bad.any(1)[:, None, None, None], torch.nan)
    return y, state


def ssd(x, dt, A, B, C, D=None, initial_state=None, chunk=256):
    """`ssd_kernel.ssd` where Triton kernels can run (`ssd_kernel.obstacle`), else `ssd_chunked`."""
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
# Each maps (B, L, D) to (B, L, D), in two ways that share their parameters and agree:
#   forward(h, context, state) -> y, state   a sequence, from its beginning (state None) or from
#                                            the state that an earlier part of it left
#   step(h, state)             -> y          one more frame (B, D); the state is updated in place


class Context(NamedTuple):
    """What a layer may read besides its own sequence."""

    text: Tensor | None  # (B, S, D), for cross-attention
    text_mask: Tensor | None  # (B, S), True at real text
    mask: Tensor | None  # (B, L), True at real positions of the sequence; None: all are real


class RMSNorm(nn.RMSNorm):
    """RMSNorm that computes in fp32 also under bf16 autocast."""

    def forward(self, h):
        return super().forward(h.to(self.weight.dtype)).to(h.dtype)


class MambaState(NamedTuple):
    conv: Tensor  # (B, d_conv - 1, H P + 2 N), the last inputs of the convolution
    ssm: Tensor  # (B, H, P, N), fp32


class Mamba2(nn.Module):
    """Mamba-2 (SSD paper, sec. 7): projection, short convolution, SSD, gate, norm, projection."""

    def __init__(self, config):
        super().__init__()
        self.chunk, self.headdim = config.chunk, config.headdim
        d_inner, N = config.expand * config.d_model, config.d_state
        heads, channels = d_inner // config.headdim, d_inner + 2 * N
        self.sizes = [d_inner, channels, heads]  # z | x B C | dt
        self.inner_sizes = [d_inner, N, N]
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        # As its authors: dt log-uniform in [1e-3, 1e-1] and -A uniform in [1, 16], so that heads
        # start with memories of one to a thousand frames.
        dt_range, A_range = (1e-3, 1e-1), (1, 16)
        if config.init == "memory":
            # With few heads and a small N, hardly any head still remembers the text when the music
            # begins. Slow decays, B and C that start near one (as Mamba-3's biases, arXiv
            # 2603.15569) and a convolution near the identity make each head a running mean.
            dt_range, A_range = (1e-2, 1), (1e-2, 1)
            self.conv1d.weight.data *= 0.3
            self.conv1d.weight.data[:, 0, -1] += 1  # the newest frame
            self.conv1d.bias.data[d_inner:] = 1  # B and C
        self.dt_bias = initial_dt_bias(heads, *dt_range)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_range).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        self.step_function = mamba_step  # `sample.prepare` may put a compiled one here

    def forward(self, h, context, state=None):
        """h (B,L,D) -> y (B,L,D) and the MambaState after the last frame. `state`: the MambaState
        to start from, None for zeros. Gradients flow through both states."""
        z, xBC, dt = self.in_proj(h).split(self.sizes, -1)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # (B, L, H), fp32
        # Padding must leave no trace: nothing of it enters the convolution, and dt = 0 there, at
        # which the state neither decays nor changes.
        if context.mask is not None:
            xBC, dt = xBC * context.mask[..., None], dt * context.mask[..., None]
        past = self.conv1d.kernel_size[0] - 1
        conv, ssm = state or (xBC.new_zeros(len(h), past, self.sizes[1]), None)
        xBC = torch.cat([conv.to(xBC.dtype), xBC], 1)  # (B, d_conv - 1 + L, H P + 2 N)
        conv = xBC[:, -past:].clone()
        xBC = F.silu(self.conv1d(xBC.mT).mT)  # (B, L, H P + 2 N)
        x, B, C = xBC.split(self.inner_sizes, -1)
        x = rearrange(x, "b l (h p) -> b l h p", p=self.headdim)
        y, ssm = ssd(x, dt, -torch.exp(self.A_log), B, C, self.D, ssm, self.chunk)
        y = self.norm(rearrange(y, "b l h p -> b l (h p)") * F.silu(z))
        return self.out_proj(y), MambaState(conv, ssm)

    def step(self, h, state):
        y = self.step_function(
            self.in_proj(h), *state, self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias,
            self.A_log, self.D, self.norm.weight, self.norm.eps,
        )  # fmt: skip
        return self.out_proj(y)


def mamba_step(zxBCdt, conv, ssm, weight, bias, dt_bias, A_log, D, norm, eps):
    """One frame through the middle of `Mamba2`: from in_proj's output to out_proj's input.

    zxBCdt (B, 2 H P + 2 N + H) -> (B, H P). The MambaState conv (B, d_conv - 1, H P + 2 N) and ssm
    (B,H,P,N) are updated in place. weight (H P + 2 N, d_conv) and bias are the convolution's; norm
    (H P,) and eps RMSNorm's.
    """
    H, P, N = ssm.shape[1:]
    z, xBC, dt = zxBCdt.split([H * P, H * P + 2 * N, H], -1)
    window = torch.cat([conv, xBC[:, None]], 1)  # (B, d_conv, H P + 2 N)
    conv.copy_(window[:, 1:])
    xBC = F.silu((window * weight.T).sum(1) + bias)
    x, B, C = xBC.split([H * P, N, N], -1)
    x = rearrange(x, "b (h p) -> b h p", p=P)
    dt = F.softplus(dt + dt_bias).to(ssm.dtype)  # (B, H)
    decay = torch.exp(-dt * torch.exp(A_log))
    u = x.to(dt.dtype) * dt[..., None]
    ssm.mul_(decay[..., None, None]).addcmul_(u[..., None], B[:, None, None].to(u.dtype))
    # Not as a matrix product: with a single column those reach a fraction of a CPU's bandwidth.
    y = (ssm * C[:, None, None].to(u.dtype)).sum(-1).to(x.dtype)
    y = rearrange(y + D[:, None] * x, "b h p -> b (h p)") * F.silu(z)
    return F.rms_norm(y.to(norm.dtype), norm.shape, norm, eps).to(zxBCdt.dtype)


def initial_dt_bias(heads, low, high):
    """Biases (heads,) whose softplus is log-uniform between low and high."""
    dt = torch.exp(torch.empty(heads).uniform_(math.log(low), math.log(high)))
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


class FeedForward(nn.Module):
    """Mixes channels, not time: D -> ff_mult D -> D with a GELU."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff_mult * config.d_model)
        self.down = nn.Linear(config.ff_mult * config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h, context, state=None):
        return self.step(h), None

    def step(self, h, state=None):  # (..., D): frames do not mix
        return self.down(self.dropout(F.gelu(self.up(h))))


class EinFFT(FeedForward):
    """The channel mixer of the original SiMBA (arXiv 2403.15360, sec. 3.1): two complex
    block-diagonal layers between a Fourier transform and its inverse, ReLU on the real and
    imaginary parts, soft threshold 0.01. SiMBA's transform also runs over the sequence; a language
    model must not see the future, so here it runs over the channels of one frame."""

    BLOCKS = 4

    def __init__(self, config):
        nn.Module.__init__(self)
        size = config.d_model // self.BLOCKS
        weights = torch.randn(2, self.BLOCKS, size, size, 2) / math.sqrt(2 * size)
        self.weights = nn.Parameter(weights)
        self.biases = nn.Parameter(torch.zeros(2, self.BLOCKS, size, 2))
        self.dropout = nn.Dropout(config.dropout)

    def step(self, h, state=None):
        weights, biases = map(torch.view_as_complex, (self.weights, self.biases))
        f = h.to(self.weights.dtype).unflatten(-1, (self.BLOCKS, -1))  # (..., 4, D / 4)
        f = torch.fft.fft2(f, norm="ortho")
        f = torch.einsum("...kd,kde->...ke", f, weights[0]) + biases[0]
        f = self.dropout(F.relu(torch.view_as_real(f)))
        f = torch.einsum("...kd,kde->...ke", torch.view_as_complex(f), weights[1]) + biases[1]
        f = torch.view_as_complex(F.softshrink(torch.view_as_real(f), 0.01))
        return torch.fft.ifft2(f, norm="ortho").real.flatten(-2).to(h.dtype)


class KVCache(NamedTuple):
    """Keys and values of the frames so far. A frame's slot is not its position: padding takes
    slots too, and positions may start below zero."""

    k: Tensor  # (B, heads, capacity, D / heads)
    v: Tensor
    real: Tensor  # (B, capacity), True at frames that may be attended to
    length: Tensor  # (1,), slots in use

    def with_room(self, steps):
        """The same with empty slots for so many steps."""
        k, v = (F.pad(slots, (0, 0, 0, steps)) for slots in (self.k, self.v))
        return KVCache(k, v, F.pad(self.real, (0, steps)), self.length)


class SelfAttention(nn.Module):
    """Multi-head causal attention: the mixer that the SSD is compared with. Its state grows."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.attention_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, h, context, state=None):
        B, L = h.shape[:2]
        q, k, v = rearrange(self.qkv(h), "b l (s h d) -> s b h l d", s=3, h=self.heads)
        real = h.new_ones(B, L, dtype=torch.bool) if context.mask is None else context.mask
        past = int(state.length) if state else 0
        if state:
            k = torch.cat([state.k[:, :, :past], k], 2)
            v = torch.cat([state.v[:, :, :past], v], 2)
            real = torch.cat([state.real[:, :past], real], 1)
        mask = None
        if state or context.mask is not None:
            until_now = torch.ones(L, past + L, dtype=torch.bool, device=h.device).tril(past)
            # A padded frame attends to itself: a row without any key would be NaN.
            mask = real[:, None, None] & until_now | until_now.triu(past)  # (B, 1, L, past + L)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        length = torch.tensor([past + L], device=h.device)
        return self.out(rearrange(y, "b h l d -> b l (h d)")), KVCache(k, v, real, length)

    def step(self, h, state):
        q, k, v = rearrange(self.qkv(h), "b (s h d) -> s b h 1 d", s=3, h=self.heads)
        state.k.index_copy_(2, state.length, k.to(state.k.dtype))
        state.v.index_copy_(2, state.length, v.to(state.v.dtype))
        state.real.index_fill_(1, state.length, True)
        state.length.add_(1)
        y = F.scaled_dot_product_attention(q, state.k, state.v, state.real[:, None, None])
        return self.out(y.flatten(1))


class CrossAttention(nn.Module):
    """Every frame attends to the whole text. The state: keys and values, computed once, and the
    text's mask."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.attention_heads
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.kv = nn.Linear(config.d_model, 2 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, h, context, state=None):
        if state is None:
            k, v = rearrange(self.kv(context.text), "b s (n h d) -> n b h s d", n=2, h=self.heads)
            state = k, v, context.text_mask[:, None, None]
        q = rearrange(self.q(h), "b l (h d) -> b h l d", h=self.heads)
        y = F.scaled_dot_product_attention(q, *state)
        return self.out(rearrange(y, "b h l d -> b l (h d)")), state

    def step(self, h, state):
        return self(h[:, None], None, state)[0][:, 0]


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
    """The language model's shape. The defaults are the paper's.

    clock: position 0 is the first token of the text ("text", as in the paper) or the first frame of
    the music ("music"); "beat" also adds the place in the beat (`MusicLM._beats`).
    """

    variant: str = option("simba", "mamba, simba, cross-simba or transformer", [*VARIANTS])
    codebooks: int = option(1, "codebooks modelled: 1 (two stages) or 9 (single stage)", "[1, 1e9]")
    blocks: int = option(24, "number of blocks", "[1, 1e9]")
    d_model: int = option(1024, "D, width of the residual stream", "[4, 1e9]")
    d_state: int = option(512, "N, columns of a head's state", "[1, 1e9]")
    headdim: int = option(64, "P, rows of a head's state", "[1, 1e9]")
    expand: int = option(2, "Mamba-2 works on expand * D channels", "[1, 1e9]")
    d_conv: int = option(4, "width of Mamba-2's convolution, in frames", "[2, 1e9]")
    init: str = option("mamba2", "initial decays: mamba2 or memory", ["mamba2", "memory"])
    chunk: int = option(256, "Q, frames in a chunk; does not change the result", "[1, 1e9]")
    ff_mult: int = option(2, "hidden width of the feed-forward layer, in D", "[1, 1e9]")
    attention_heads: int = option(8, "heads of self- and cross-attention", "[1, 1e9]")
    mixer: str = option("ff", "channel mixer of the simbas: ff or einfft", ["ff", "einfft"])
    d_text: int = option(768, "width of the text encoder's output", "[1, 1e9]")
    dropout: float = option(0.3, "after every layer and inside the feed-forward", "[0, 1)")
    codebook_size: int = option(1024, "codes; one more id is begin and padding", "[2, 1e9]")
    clock: str = option("text", "where positions start", ["text", "music", "beat"])
    trained_frames: int = option(2584, "later positions repeat the last one", "[1, 1e9]")

    def __post_init__(self):
        check_shape(self)
        if self.mixer == "einfft" and self.variant not in ("simba", "cross-simba"):
            raise ValueError(f"--mixer einfft goes with simba and cross-simba, not {self.variant}")

    @property
    def prefix(self):
        """Whether the text comes in front of the music, or through cross-attention."""
        return CrossAttention not in VARIANTS[self.variant]


def check_shape(config):
    """ValueError, in one sentence, if sizes of an LMConfig or a RefinerConfig do not fit."""
    check(config)
    D, heads, inner = config.d_model, config.attention_heads, config.expand * config.d_model
    if D % 4:
        raise ValueError(f"--d-model must be a multiple of 4, not {D}")
    if D % heads:
        raise ValueError(f"--attention-heads {heads} must divide --d-model {D}")
    if inner % config.headdim:
        raise ValueError(f"--headdim {config.headdim} must divide {inner}")


class Block(nn.Module):
    """h <- h + dropout(layer(norm(h))), for each layer of the variant in turn."""

    def __init__(self, config):
        super().__init__()
        layers = VARIANTS[config.variant]
        if config.mixer == "einfft":
            layers = [EinFFT if layer is FeedForward else layer for layer in layers]
        self.layers = nn.ModuleList(layer(config) for layer in layers)
        self.norms = nn.ModuleList(RMSNorm(config.d_model, eps=1e-5) for _ in layers)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h, context, states=None):
        states = states or [None] * len(self.layers)
        after = []
        for layer, norm, state in zip(self.layers, self.norms, states):
            y, state = layer(norm(h), context, state)
            h = h + self.dropout(y)
            after.append(state)
        return h, after

    def step(self, h, states):
        for layer, norm, state in zip(self.layers, self.norms, states):
            h = h + layer.step(norm(h), state)
        return h


def sinusoids(position, width, dtype=torch.float32):
    """positions (...) -> (..., width): cosines, then sines, with periods 2 pi to 20,000 pi."""
    exponent = torch.arange(width // 2, device=position.device, dtype=dtype) / (width // 2 - 1)
    angle = position[..., None].to(dtype) / 10000**exponent
    return torch.cat([angle.cos(), angle.sin()], -1)


class LMState(NamedTuple):
    """All that the model remembers of what it has read."""

    blocks: list  # what each layer of each block returned: MambaState, KVCache, ...
    position: Tensor  # (B,), of the next frame (LMConfig.clock); padding does not count
    tempo: Tensor  # (B,), the bpm in the text, 0 where there is none
    past: int  # frames of music before position 0, which count for the metronome


class MusicLM(nn.Module):
    """A language model over codec tokens, conditioned on text.

    `lm(codes (B,K,L), text (B,S,d_text), text_mask (B,S), tempo (B,)) -> logits (B,K,L,V)`, where
    `logits[:, k, t]` predicts `codes[:, k, t]` from the text and earlier tokens. The model itself
    adds the begin token, the shift and the delay pattern. Only a model with clock "beat" uses the
    tempo, which may be left out.
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        D, V = config.d_model, config.codebook_size + 1
        self.text_proj = nn.Linear(config.d_text, D)
        self.text_norm = nn.LayerNorm(D)
        self.embeddings = nn.ModuleList(nn.Embedding(V, D) for _ in range(config.codebooks))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.heads = nn.ModuleList(nn.Linear(D, V, bias=False) for _ in range(config.codebooks))
        if config.clock == "beat":
            periods = torch.tensor([1 / 4, 1 / 2, 1, 2, 3, 4])  # beats: a sixteenth note to a bar
            self.register_buffer("periods", periods, persistent=False)
            self.beat_proj = nn.Linear(2 * len(periods) + 1, D, bias=False)
            self.beat_proj.weight.data.zero_()  # starts as clock "music"
        self.recompute = 0  # in training, this many blocks are recomputed in the backward pass
        # What a layer adds to the residual stream shrinks with depth, as in GPT-2 and Mamba.
        depth = sum(len(block.layers) for block in self.blocks)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "out.weight", "down.weight")):
                parameter.data /= math.sqrt(depth)

    def forward(self, codes, text, text_mask, tempo=None):
        K, L = codes.shape[1:]
        h, _ = self.read(self.delay(codes)[:, :, : L + K - 1], text, text_mask, tempo)
        return torch.stack([head(h[:, k : k + L]) for k, head in enumerate(self.heads)], 1)

    def logits(self, h):
        """hidden (B, ..., D) -> (B, K, ..., V)"""
        return torch.stack([head(h) for head in self.heads], 1)

    def delay(self, codes):
        """(B, K, L) -> columns (B, K, L + K): codebook k (from 0) is shifted right by k + 1, behind
        the special token. Reading column s, the model predicts code (k, s - k) for every k: the
        codebooks of a frame come one after the other, each conditioned on the coarser ones."""
        B, K, L = codes.shape
        columns = codes.new_full((B, K, L + K), self.config.codebook_size)
        for k in range(K):
            columns[:, k, k + 1 : k + 1 + L] = codes[:, k]
        return columns

    def read(self, columns, text=None, text_mask=None, tempo=None, state=None, past=0):
        """Reads columns (B,K,L) (see `delay`) in parallel -> hidden (B,L,D) and the LMState after
        them.

        text (B,S,d_text), text_mask (B,S), tempo (B,): read first, at the beginning of a piece.
        past: frames of the piece before these columns; the metronome counts them, positions do not.
        state: where an earlier part of the same sequence ended, instead of the text. Reading a
        sequence in parts gives the same hidden vectors, states and gradients as reading it whole.
        """
        h = self._embed(columns)
        B, L = h.shape[:2]
        position = torch.arange(L, device=h.device).expand(B, L)
        mask = None
        if state:
            tempo, past = state.tempo, state.past
            position = state.position[:, None] + position
        else:
            tempo = text.new_zeros(B) if tempo is None else tempo
            text = self.text_norm(self.text_proj(text))  # (B, S, D)
            if self.config.prefix:
                # Padding moves to the left, so that the text ends where the music begins.
                text_mask, order = text_mask.sort(dim=1, stable=True)
                text = text.gather(1, order[..., None].expand_as(text))
                h = torch.cat([text, h], 1)
                mask = torch.cat([text_mask, text_mask.new_ones(B, L)], 1)
                position = mask.cumsum(1) - 1
                if self.config.clock != "text":  # the text has negative positions
                    position = position - text_mask.sum(1, keepdim=True)
        h = h + self._positions(position, tempo[:, None], past)
        context = Context(text, text_mask, mask)
        before = state.blocks if state else [None] * len(self.blocks)
        after = []
        for i, (block, states) in enumerate(zip(self.blocks, before)):
            if self.training and i < self.recompute:
                h, states = checkpoint(block, h, context, states, use_reentrant=False)
            else:
                h, states = block(h, context, states)
            after.append(states)
        return h[:, -L:], LMState(after, position[:, -1] + 1, tempo, past)

    def _embed(self, columns):
        """(B, K, ...) -> (B, ..., D): the sum of the codebooks' embeddings."""
        return sum(embed(columns[:, k]) for k, embed in enumerate(self.embeddings))

    def _positions(self, position, tempo, past=0):
        """Sinusoids (..., D). Later positions than those of training repeat the last one: unseen
        sinusoids derail the model, a familiar one does not."""
        known = position.clamp(max=self.config.trained_frames - 1)
        h = sinusoids(known, self.config.d_model, self.text_norm.weight.dtype)
        return h + self._beats(position, tempo, past) if self.config.clock == "beat" else h

    def _beats(self, position, tempo, past=0):
        """A metronome: where in the beat and the bar each frame is, if the text names a tempo.

        positions (...) and bpm, 0 for unknown -> (..., D). A small model learns slowly what a
        number of bpm means, and drifts from the beat. The metronome starts with the music.
        """
        beats = (position + past) * (tempo / (60 * FRAME_RATE))
        angle = 2 * math.pi * (beats[..., None] / self.periods).frac()
        waves = torch.cat([angle.cos(), angle.sin(), torch.ones_like(angle[..., :1])], -1)
        known = (tempo > 0) & (position >= 0)
        return self.beat_proj((waves * known[..., None]).to(self.beat_proj.weight.dtype))

    def prefill(self, text, text_mask, tempo=None, codes=None, room=0, past=0):
        """Reads the text, the begin token and the codes (B,K,T) so far, if any
        -> logits (B,K,V) of the next column, and the LMState to `step` from. room: number of steps
        to come, for the layers whose state is a cache. past: see `read`."""
        if codes is None:
            codes = torch.empty(len(text), len(self.heads), 0, dtype=torch.long, device=text.device)
        columns = self.delay(codes)[:, :, : codes.shape[2] + 1]
        h, state = self.read(columns, text, text_mask, tempo, past=past)
        for states in state.blocks:
            states[:] = [s.with_room(room) if hasattr(s, "with_room") else s for s in states]
        return self.logits(h[:, -1]), state

    def step(self, column, state):
        """column (B,K), the tokens just chosen -> logits (B,K,V) of the next; updates state."""
        h = self._embed(column) + self._positions(state.position, state.tempo, state.past)
        for block, states in zip(self.blocks, state.blocks):
            h = block.step(h, states)
        state.position.add_(1)
        return self.logits(h)
