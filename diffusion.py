"""The second stage: from the first codebook to all nine, by diffusion.

The language model writes a sketch, one code a frame, which holds the rhythm and the form of the
music. This model paints: given the sketch and the text, it makes codebooks 2 ... 9 of all frames at
once, by starting from noise and removing it in a few steps. The sketch stays as it is (SSMTTM
III-B, eq. 4). docs/refiner.md says why each part is as it is.

    1  the noise       a schedule, three ways to say the same thing, one step backwards
    2  the layers      BiMamba2, an SSD that looks both ways; a layer with time and text (adaLN)
    3  the model       RefinerConfig, Refiner, and what it is trained for: `refiner_loss`
    4  refining        `refine`: codes in, codes out, window by window, any length

Letters are model.py's: B batch · L frames · K codebooks · D d_model · H heads · P headdim ·
N d_state. C = 8 (K - 1) are the channels of the codes that are made, t is a time of diffusion.

Papers: the task is DiscoDiff's (Lanzendoerfer et al., ICASSP 2025), made small; the layers are
DiT's (arXiv 2212.09748) with PixArt's shared adaLN (arXiv 2310.00426); the mixer that looks both
ways is Hydra's (arXiv 2407.09941).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import load_weights, read_config, read_model_config
from model import FeedForward, RMSNorm, SelfAttention, check_shape, initial_dt_bias, sinusoids, ssd
from options import option

# ------------------------------------------------------------------------------------------------
# 1  The noise
#
# x_0 is what we want: the vectors of the fine codes, scaled so that every channel has variance one.
# It is mixed with noise e of the same variance, and the mixture has variance one as well:
#
#     x_t = a_t x_0 + b_t e          a_t^2 + b_t^2 = 1          t = 0 (clean) ... T (noise)
#
# As t runs from 0 to T, x_t turns from x_0 to e at about constant speed (Nichol & Dhariwal, arXiv
# 2102.09672, eq. 17). The network predicts the direction in which x_t turns (Salimans & Ho, arXiv
# 2202.00512), because that is about equally hard at all times:
#
#     v = a_t e - b_t x_0        so that        x_0 = a_t x_t - b_t v,        e = b_t x_t + a_t v
#
# One step back, to an earlier s < t, with z fresh noise:
#
#     x_s = a_s x_0 + sqrt(b_s^2 - n^2) e + n z
#
# With n = 0 nothing is random after the first x_T. This is DDIM (Song et al., arXiv 2010.02502),
# which may take long strides. With
#
#     n^2 = (b_s^2 / b_t^2) (1 - a_t^2 / a_s^2)
#
# x_s is drawn from q(x_s | x_t, x_0), Bayes' answer to what came before x_t. This is DDPM (Ho et
# al., SSMTTM [46]), which corrects old errors with fresh noise, and needs every step.


def cosine_schedule(T, s=0.008, most=0.999):
    """a_t^2 for t = 0 ... T: (T + 1,) float64, from 1 down to nearly 0, so that no step divides
    by zero."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + s) / (1 + s) * math.pi / 2).square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=most)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def turn(x, y, a, b):
    """(x_0, e) -> (x_t, v): by the angle whose cosine and sine are a and b."""
    return a * x + b * y, a * y - b * x


def turn_back(x, v, a, b):
    """(x_t, v) -> (x_0, e)"""
    return a * x - b * v, b * x + a * v


def denoise(predict, x, schedule, steps, generator=None, known=None, limit=math.inf):
    """From noise x (B, C, L) to x_0: DDPM if `steps` is T, else DDIM, in short steps at high noise.

    predict(x_t, t) -> v, with t an int; generator: of the noise on the way; known (B, C, k): the
    true x_0 of the first k frames, which are held to it, so that the rest goes on from them; limit
    (C, 1): the largest magnitude that any x_0 has.
    """
    T = len(schedule) - 1
    if not 1 <= steps <= T:
        raise ValueError(f"a number of steps from 1 to {T}, not {steps}")
    draw = lambda like: torch.randn(like.shape, generator=generator).to(like)
    power = 1 if steps == T else 1.5  # what the music will be is decided at high noise
    stops = sorted({round(T - T * (i / steps) ** power) for i in range(steps + 1)}, reverse=True)
    a, b = schedule.sqrt().tolist(), (1 - schedule).sqrt().tolist()
    known = x[..., :0] if known is None else known
    fixed = draw(known)
    for t, s in zip(stops, stops[1:]):
        x = torch.cat([a[t] * known + b[t] * fixed, x[..., known.shape[2] :]], 2)
        x0, _ = turn_back(x, predict(x, t), a[t], b[t])
        x0 = x0.clamp(-limit, limit)
        e = (x - a[t] * x0) / b[t]
        n = b[s] / b[t] * math.sqrt(1 - (a[t] / a[s]) ** 2) if steps == T else 0.0
        x = a[s] * x0 + math.sqrt(max(b[s] ** 2 - n**2, 0)) * e
        if n:
            x = x + n * draw(x)
    return x


# ------------------------------------------------------------------------------------------------
# 2  The layers: (B, L, D) -> (B, L, D)


class BiMamba2(nn.Module):
    """Mamba-2 that looks both ways (Hydra, arXiv 2407.09941, sec. 3).

    Two SSDs, one over the frames in order and one in reverse order, run as one of twice the batch.
    They share x, the gate and A; B, C and dt are their own. As matrices over time one is lower and
    the other upper triangular, and both have a diagonal; so each is shifted by one frame, to leave
    the frame itself to D x alone:

        y_t = (forward at t - 1) + (backward at t + 1) + D x_t
    """

    def __init__(self, config):
        super().__init__()
        self.chunk, self.headdim = config.chunk, config.headdim
        d_inner, N = config.expand * config.d_model, config.d_state
        heads = d_inner // config.headdim
        self.sizes = [d_inner, d_inner + 4 * N, 2 * heads]  # z | x B B' C C' | dt dt'
        self.inner_sizes = [d_inner, 2 * N, 2 * N]
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        channels, taps = self.sizes[1], config.d_conv
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, padding=taps // 2)
        self.dt_bias = initial_dt_bias(2 * heads, 1e-2, 1)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-2, 1).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)

    def forward(self, h):
        z, xBC, dt = self.in_proj(h).split(self.sizes, -1)
        x, B, C = F.silu(self.conv1d(xBC.mT).mT).split(self.inner_sizes, -1)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # (B, L, 2 H)
        x = rearrange(x, "b l (h p) -> b l h p", p=self.headdim)
        both = lambda forward, backward: torch.cat([forward, backward.flip(1)])
        dt, B, C = (both(*v.chunk(2, -1)) for v in (dt, B, C))  # (2 B, L, ...)
        y, _ = ssd(both(x, x), dt, -torch.exp(self.A_log), B, C, chunk=self.chunk)
        before, after = F.pad(y, (0, 0, 0, 0, 1, -1)).chunk(2)  # (B, L, H, P)
        y = before + after.flip(1) + self.D[:, None].to(x.dtype) * x
        return self.out_proj(self.norm(rearrange(y, "b l h p -> b l (h p)") * F.silu(z)))


class Attention(SelfAttention):
    """The baseline: every frame looks at every other."""

    def forward(self, h):
        q, k, v = rearrange(self.qkv(h), "b l (s h d) -> s b h l d", s=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


MIXERS = {"ssd": BiMamba2, "attention": Attention}


class Layer(nn.Module):
    """A mixer over frames and a feed-forward over channels. What time and text have to say enters
    as a scale, a shift and a gate of each (DiT's adaLN), six vectors that all layers receive alike
    and to which each adds its own table (PixArt's adaLN-single)."""

    def __init__(self, config):
        super().__init__()
        self.mixer, self.ff = MIXERS[config.backbone](config), FeedForward(config)
        self.table = nn.Parameter(torch.randn(6, config.d_model) / config.d_model**0.5)

    def forward(self, h, modulation):  # (B, L, D), (B, 6, D)
        vectors = (self.table + modulation)[:, :, None].unflatten(1, (2, 3))  # (B, 2, 3, 1, D)
        for mix, three in zip((self.mixer, self.ff.step), vectors.unbind(1)):
            scale, shift, gate = three.unbind(1)
            h = h + gate * mix(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        return h


# ------------------------------------------------------------------------------------------------
# 3  The model


@dataclass
class RefinerConfig:
    """The refiner's shape. The defaults are the paper-size preset's: 49 M parameters."""

    backbone: str = option("ssd", "mixes the frames: ssd (bidirectional) or attention", [*MIXERS])
    layers: int = option(12, "layers, of a mixer and a feed-forward each", "[1, 1e9]")
    d_model: int = option(512, "D, width of the residual stream", "[4, 1e9]")
    d_state: int = option(64, "N, columns of a head's state", "[1, 1e9]")
    headdim: int = option(64, "P, rows of a head's state", "[1, 1e9]")
    expand: int = option(2, "the SSD works on expand * D channels", "[1, 1e9]")
    d_conv: int = option(7, "width of the centred convolution, odd", "[1, 1e9]")
    chunk: int = option(64, "Q, frames in a chunk; does not change the result", "[1, 1e9]")
    attention_heads: int = option(8, "heads of the attention backbone", "[1, 1e9]")
    ff_mult: int = option(4, "hidden width of the feed-forward layer, in D", "[1, 1e9]")
    dropout: float = option(0.0, "inside the feed-forward", "[0, 1)")
    codebooks: int = option(9, "K; the first is given, the others are made", "[2, 1e9]")
    code_dim: int = option(8, "dimensions of a code's vector", "[1, 1e9]")
    codebook_size: int = option(1024, "codes of a codebook", "[2, 1e9]")
    d_text: int = option(768, "width of the text encoder's output", "[1, 1e9]")
    timesteps: int = option(100, "T, steps from data to noise", "[1, 1e9]")
    window: int = option(861, "frames refined at once, as many as in training", "[1, 1e9]")

    def __post_init__(self):
        check_shape(self)
        self.variant, self.blocks = "refiner", self.layers  # no fields, but an LMConfig has them
        if self.d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, to have a middle, not {self.d_conv}")


class Refiner(nn.Module):
    """Tells v from x_t, the time, the sketch and the text.

    refiner(x (B,C,L), t (B,), coarse (B,8,L), text (B,d_text), sketched (B,)) -> v (B,C,L); where
    `sketched` is False, the sketch is not looked at. Any L.
    """

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        D, channels = config.d_model, (config.codebooks - 1) * config.code_dim
        # Set by `fit`: what makes every dimension of every codebook's entries of variance one.
        self.register_buffer("scale", torch.ones(config.codebooks, config.code_dim, 1))
        self.register_buffer("limit", torch.full((channels, 1), torch.inf))
        self.schedule = cosine_schedule(config.timesteps)  # stays on the CPU: MPS has no float64
        self.nothing = nn.Parameter(torch.zeros(config.code_dim, 1))  # in place of the sketch
        self.into = nn.Linear(channels + config.code_dim, D)
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.text = nn.Linear(config.d_text, D)
        self.modulate = nn.Linear(D, 6 * D)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D)
        self.out = nn.Linear(D, channels)
        nn.init.normal_(self.modulate.weight, std=0.02)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, t, coarse, text, sketched):
        D = self.config.d_model
        coarse = torch.where(sketched[:, None, None], coarse, self.nothing.to(coarse.dtype))
        h = self.into(torch.cat([x, coarse], 1).mT)  # (B, L, D)
        if self.config.backbone == "attention":  # an SSD knows what is before and what behind
            h = h + sinusoids(torch.arange(h.shape[1], device=h.device), D).to(h.dtype)
        said = self.time(sinusoids(t, D)) + self.text(text)  # (B, D)
        modulation = self.modulate(F.silu(said)).unflatten(-1, (6, D))
        for layer in self.layers:
            h = layer(h, modulation)
        return self.out(self.norm(h)).mT

    @torch.no_grad()
    def fit(self, codec):
        """Takes the scale of each dimension from the entries of the codec's codebooks."""
        K = self.config.codebooks
        every = torch.arange(self.config.codebook_size).expand(1, K, -1)
        entries = codec.vectors(every)[0]  # (K, 8, 1024)
        self.scale.copy_(1 / entries.square().mean(2, keepdim=True).sqrt().clamp(min=1e-6))
        self.limit.copy_((self.scale * entries)[1:].abs().amax(2, keepdim=True).flatten(0, 1))

    def signal(self, codec, codes):
        """codes (B, k, L) -> x_0 (B, 8 (k - 1), L) and coarse (B, 8, L)"""
        vectors = codec.vectors(codes) * self.scale[: codes.shape[1]]  # (B, k, 8, L)
        return vectors[:, 1:].flatten(1, 2), vectors[:, 0]

    def snap(self, codec, x0):
        """x_0 (B, C, L) -> codes 2 ... K, (B, K - 1, L): near entries, see codec.py"""
        vectors = x0.unflatten(1, (-1, self.config.code_dim)) / self.scale[1:]
        return codec.snap(vectors, first=1)


def refiner_loss(
    refiner, encoder, codec, codes, captions, sketch_dropout=0.2, generator=None, teacher=None
):  # fmt: skip
    """Mean (v - prediction)^2 at random times, most of them noisy, for codes (B, K, L) and their
    captions; those to be dropped are empty already, the sketch is dropped here.

    teacher: (x, t, coarse, text, empty) -> v, the guided predictions of another refiner, which are
    learned in place of the data's v (Meng et al., arXiv 2210.03142), with the sketch always there.
    """
    config, B = refiner.config, len(codes)
    real = (codes[:, :1] != config.codebook_size).to(torch.float32)  # (B, 1, L); the rest: padding
    device = codes.device
    draw = lambda *shape: torch.rand(*shape, generator=generator).to(device)
    x0, coarse = refiner.signal(codec, codes.clamp(max=config.codebook_size - 1))
    # Times are spread evenly over the batch, and dense in the noise, as t^2: that decides what the
    # music will be. Little is left to learn at low noise, because vectors snap to codes.
    u = (draw(B) + torch.arange(B, device=device)) / B
    t = (config.timesteps * u ** (1 / 3)).long().clamp(max=config.timesteps - 1) + 1
    noise = torch.randn(x0.shape, generator=generator).to(device)
    squares = refiner.schedule, 1 - refiner.schedule
    a, b = (s.sqrt().float().to(device)[t, None, None] for s in squares)
    x, v = turn(x0, noise, a, b)
    text = encoder.pooled(captions)
    if teacher:
        sketch_dropout = 0.0
        v = teacher(x, t, coarse, text, encoder.pooled([""]).expand_as(text))
    found = refiner(x, t, coarse, text, draw(B) >= sketch_dropout)
    # The entries of coarse codebooks lie farther apart and decide more of the sound: their errors
    # count more. They are squared because the minimum is then the mean, which the sampler needs.
    weight = 1 / refiner.scale[1:].flatten(0, 1)  # (C, 1)
    error = (found.float() - v).square() * (weight / weight.mean())
    return (error * real).sum() / (real.sum() * x0.shape[1])


# ------------------------------------------------------------------------------------------------
# 4  Refining

# Shares of a window: frames that are taken over from the window before, or of music that was heard,
# and frames that are painted only as a look ahead and then painted again.
KNOWN, HEARD, AHEAD = 1 / 8, 1 / 2, 1 / 16


@torch.inference_mode()
def refine(
    refiner, encoder, codec, prompt, pieces, seed, *, heard=None, **options
) -> Iterator[Tensor]:  # fmt: skip
    """Pieces (1, l) of codebook 1, cut anywhere -> pieces (K, l) of all codebooks, whose first row
    is what was given. As many frames come out as went in.

    Music is refined in windows as long as the clips of training, in constant memory. The first
    frames of a window are the last of the window before: they are held fixed at every step and the
    others continue them, as in inpainting. In the same way all of it continues `heard` (K, T),
    which is not yielded. options: see `paint`. The same arguments give the same codes.
    """
    window = refiner.config.window
    known, before, ahead = (int(share * window) for share in (KNOWN, HEARD, AHEAD))
    text = encoder.pooled([prompt, ""])
    if heard is None:
        heard = torch.empty(refiner.config.codebooks, 0, dtype=torch.long)
    coarse = heard[:1, -before:]  # codebook 1 of the frames in the window
    fine = heard[1:, -before:]  # the other codebooks of those that are finished
    for piece in pieces:
        coarse = torch.cat([coarse, piece], 1)
        while coarse.shape[1] > window:
            made = paint(refiner, codec, text, coarse[:, :window], fine, seed, **options)
            end = window - ahead  # what follows is painted again, with more of its future
            yield torch.cat([coarse[:1, :end], made[:, :end]])[:, fine.shape[1] :]
            coarse, fine = coarse[:, end - known :], made[:, end - known : end]
            seed += 1 << 32
    if coarse.shape[1] > fine.shape[1]:
        made = paint(refiner, codec, text, coarse, fine, seed, **options)
        yield torch.cat([coarse, made])[:, fine.shape[1] :]


def guided(refiner, x, t, sketch, text, empty, guidance, sketch_guidance):
    """v (B,C,L), with guidance of the text and of codebook 1 (the sketch) apart, as in
    InstructPix2Pix (arXiv 2211.09800, eq. 3):

        v = u + sketch_guidance (s - u) + guidance (c - s)

    with u predicted from neither, s from the sketch alone, c from both. If both factors are 1, that
    is c, in one pass: so plays a refiner that was distilled from a guided one.
    """
    yes = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if guidance == sketch_guidance == 1:
        return refiner(x, t, sketch, text, yes)
    x, t, sketch = (torch.cat([v] * 3) for v in (x, t, sketch))
    v = refiner(x, t, sketch, torch.cat([text, empty, empty]), torch.cat([yes, yes, ~yes]))
    c, s, u = v.chunk(3)
    return u + sketch_guidance * (s - u) + guidance * (c - s)


def paint(
    refiner, codec, text, coarse, fine, seed, steps=25, guidance=2.0, sketch_guidance=2.0,
    spread=1.0,
):  # fmt: skip
    """One window: codebook 1 (1, L) and the finished frames of the others (K - 1, l), l <= L
    -> codebooks 2 ... K (K - 1, L).

    text (2, d_text): the prompt's and the empty one; steps: see `denoise`; guidance: see `guided`;
    spread: the standard deviation of the first noise, above 1 for samples that differ more.
    """
    device = refiner.out.weight.device
    finished = torch.cat([coarse[:, : fine.shape[1]], fine])[None].to(device)
    known, _ = refiner.signal(codec, finished)  # (1, C, l)
    _, sketch = refiner.signal(codec, coarse[None].to(device))  # (1, 8, L)

    def predict(x, t):
        t = torch.full((1,), t, device=device)
        return guided(refiner, x, t, sketch, *text.split(1), guidance, sketch_guidance)

    generator = torch.Generator().manual_seed(seed)
    noise = spread * torch.randn(1, len(refiner.limit), coarse.shape[1], generator=generator)
    noise = noise.to(device)
    x0 = denoise(predict, noise, refiner.schedule, steps, generator, known, refiner.limit)
    return torch.cat([fine, refiner.snap(codec, x0)[0, :, fine.shape[1] :].cpu()], 1)


def is_refiner(config) -> bool:
    """Whether a checkpoint's config.json, as `read_config` gives it, is that of a refiner."""
    return "backbone" in config.get("model", {})


def load_refiner(folder) -> Refiner:
    """The refiner of a checkpoint folder, in eval mode. ValueError if it holds none."""
    refiner = Refiner(read_model_config(folder, RefinerConfig))
    load_weights(refiner, folder, "lm.")
    return refiner.eval()


def teacher(folder):
    """The guided predictions of a refiner's checkpoint, as `refiner_loss` takes them."""
    refiner = load_refiner(folder).requires_grad_(False)
    options = read_config(folder).get("sampling") or {}
    factors = [options.get(name, 2.0) for name in ("guidance", "sketch_guidance")]

    @torch.no_grad()
    def predict(x, *rest):
        return guided(refiner.to(x.device), x, *rest, *factors)

    return predict
