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
    y = torch.stack(outputs, 1).to(x.dtype) if outputs else torch.zeros_like(x)  # (B, L, H, P)
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x
    return y, state


@ssd_kernel.nan_stays_causal
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
    L, H, Q = *x.shape[1:3], max(1, min(chunk, x.shape[1]))
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
    if entering:
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
CLOCKS = ("text", "music", "beat")  # positions count from the text, or from the music; `_beats`


@dataclass
class LMConfig:
    """The language model's shape. The defaults are the paper's."""

    variant: str = option("simba", "mamba, simba, cross-simba or transformer", [*VARIANTS])
    codebooks: int = option(1, "codebooks modelled: 1 (two stages) or 9 (single stage)", "[1, inf)")
    blocks: int = option(24, "number of blocks", "[1, inf)")
    d_model: int = option(1024, "D, width of the residual stream", "[4, inf)")
    d_state: int = option(512, "N, columns of a head's state", "[1, inf)")
    headdim: int = option(64, "P, rows of a head's state", "[1, inf)")
    expand: int = option(2, "Mamba-2 works on expand * D channels", "[1, inf)")
    d_conv: int = option(4, "width of Mamba-2's convolution, in frames", "[2, inf)")
    init: str = option("mamba2", "initial decays: mamba2 or memory", ["mamba2", "memory"])
    chunk: int = option(256, "Q, frames in a chunk; does not change the result", "[1, inf)")
    ff_mult: int = option(2, "hidden width of the feed-forward layer, in D", "[1, inf)")
    attention_heads: int = option(8, "heads of self- and cross-attention", "[1, inf)")
    mixer: str = option("ff", "channel mixer of the simbas: ff or einfft", ["ff", "einfft"])
    d_text: int = option(768, "width of the text encoder's output", "[1, inf)")
    dropout: float = option(0.3, "after every layer and inside the feed-forward", "[0, 1)")
    codebook_size: int = option(1024, "codes; one more id is begin and padding", "[2, inf)")
    clock: str = option("text", "where positions start: text, music or beat", [*CLOCKS])
    trained_frames: int = option(2584, "later positions repeat the last one", "[1, inf)")

    def __post_init__(self):
        check(self)
        if self.mixer == "einfft" and self.variant not in ("simba", "cross-simba"):
            raise ValueError(f"--mixer einfft goes with simba and cross-simba, not {self.variant}")
        if self.expand * self.d_model % self.headdim:
            raise ValueError(f"headdim {self.headdim} must divide {self.expand * self.d_model}")
        if self.d_model % self.attention_heads:
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
