"""What a training run will cost, before it starts: parameters, tokens, FLOPs, memory and hours.

    python train.py --variant simba --preset paper --dry-run

Nothing is allocated: tensors have a shape and no contents. One forward pass shows what autograd
keeps for the backward pass, compiled if the run is to be compiled. A model of one block and one of
two give the cost of a block and that of the rest.
"""

from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import benchmark

import ssd_kernel
from data import seen_before, stages
from diffusion import Refiner, RefinerConfig
from model import MusicLM
from sample import multiplies_bf16
from text import TYPICAL_LENGTH

FLAN_T5_BASE = 109_628_544  # parameters of its encoder
RTX_3090 = 71e12  # FLOPs a second of its bf16 products, by its data sheet
UTILISATION = 0.4  # of the rate of matrix products; an assumption
TIMED = 0.5  # seconds that a function is run for, to time it


def build(config):
    return (Refiner if isinstance(config, RefinerConfig) else MusicLM)(config)


def parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def memory(config, train, text_parameters) -> dict:
    """Bytes at the end of the forward pass, the peak of a training step on one GPU, by use.
    train: a TrainConfig; text_parameters: of the text encoder."""
    _, frames, batch = stages(train)[-1]
    name = "layers" if isinstance(config, RefinerConfig) else "blocks"
    one, two = (kept(replace(config, **{name: n}), frames, batch, train.compile) for n in (1, 2))
    again = min(train.recompute, config.blocks)  # blocks of which only the input is kept
    block_input = 4 * batch * (frames + TYPICAL_LENGTH) * config.d_model
    return {
        "weights, gradients, AdamW": (20 if train.ema else 16) * parameters(config),
        "text encoder": (16 if train.train_text_encoder else 2) * text_parameters,
        "activations": one + (two - one) * (config.blocks - 1 - again) + block_input * again,
    }


def kept(config, frames, batch, compiled) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    # The kernels run on a GPU, and keep less than the PyTorch form. Only their signature is used.
    kernels = mock.patch.multiple(ssd_kernel, available=lambda x: True, triton="not needed")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, kernels, torch.autocast("cpu", torch.bfloat16):
        text = torch.zeros(batch, TYPICAL_LENGTH, config.d_text)
        if isinstance(config, RefinerConfig):
            codes = torch.zeros(batch, config.codebooks, config.code_dim, frames)
            t, sketched = torch.zeros(batch), torch.ones(batch) > 0
            inputs = codes[:, 1:].flatten(1, 2), t, codes[:, 0], text[:, 0], sketched
        else:
            codes = torch.zeros(batch, config.codebooks, frames, dtype=torch.long)
            inputs = codes, text, torch.ones(batch, TYPICAL_LENGTH) > 0
        output, size = saved(build(config).train(), inputs, compiled)
        # The loss: logits in fp32 and their softmax, and both again in the backward pass.
        return size + 4 * 4 * output.numel()


def saved(model, inputs, compiled=False):
    """-> the output, and the bytes that autograd saves besides the parameters"""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}  # holding them keeps their addresses from being used again

    def pack(v):
        storages[v.untyped_storage()._cdata] = v.untyped_storage()
        return v

    if compiled:  # "aot_eager" divides the graph as torch.compile does, and generates no code
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager", dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        output = model(*inputs)
    return output, sum(s.nbytes() for address, s in storages.items() if address not in own)


def products_per_second(device) -> float:
    """FLOPs a second of a matrix product on this device, in the type that training uses."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    a = a.bfloat16() if multiplies_bf16(device) else a
    return 2 * size**3 / median_seconds(lambda: F.linear(a, a))


def median_seconds(function) -> float:
    """The median time of a call, which includes the work that it leaves to a GPU."""
    function()  # compiles kernels
    timer = benchmark.Timer("f()", globals=dict(f=function), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=TIMED).median


def report(config, train, device) -> str:
    """The dry run of a config and a TrainConfig: cost, memory on a GPU, and hours."""
    text = FLAN_T5_BASE
    if train.text_encoder == "toy":
        from toy import corpus

        text = sum(p.numel() for p in corpus.text_encoder().parameters())
    parts = memory(config, train, text)
    uses = ", ".join(f"{use} {size / 1e9:.1f}" for use, size in parts.items())
    rate = products_per_second(device)
    hours = [flops(config, train) / (UTILISATION * r) / 3600 for r in (rate, RTX_3090)]
    here, there = (f"{60 * h:.1f} minutes" if h < 1 else f"{h:,.0f} hours" for h in hours)
    return f"""{describe_cost(config, train, text)}
memory on a GPU: {sum(parts.values()) / 1e9:.1f} GB ({uses}); to need less: --recompute BLOCKS, a \
smaller --batch with more --accumulate, --fsdp on several cards
about {here} on one such {device.type}, at {UTILISATION:.0%} of the {rate / 1e12:.2f} TFLOP/s of \
its matrix products; {there} on an RTX 3090"""


def flops(config, train) -> float:
    """6 x parameters x tokens (SSMTTM, [4] there)"""
    return 6 * parameters(config) * seen_before(train.steps, train)[1]


def describe_cost(config, train, text_parameters) -> str:
    """The first lines of every run: parameters, tokens and FLOPs."""
    trained = "trained too" if train.train_text_encoder else "frozen"
    return f"""{config.variant}, {config.blocks} blocks, {config.codebooks} codebook(s): \
{parameters(config) / 1e6:.2f} M parameters (text encoder {text_parameters / 1e6:.2f} M, {trained})
{train.steps:,} steps, {seen_before(train.steps, train)[1]:.2e} tokens, 6 x parameters x tokens = \
{flops(config, train):.1e} FLOPs (the paper's runs 1e+19, MusicGen-small 1e+20)"""
