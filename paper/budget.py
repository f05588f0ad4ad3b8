"""What a training run will cost, before it has cost anything: parameters, tokens, FLOPs, memory and
hours.

    python train.py --variant simba --preset paper --dry-run

Nothing is allocated for it. The model is built of tensors that have a shape and no contents, run
forward once, and what autograd keeps for the way back is counted: as it is, tensor by tensor, or,
where the run is to be compiled, as torch.compile's partitioner would divide the graph. Two models,
of one block and of two, tell the cost of a block and that of the rest.
"""

import time
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import ssd_kernel
from data import seen_before, stages
from diffusion import Refiner, RefinerConfig
from model import MusicLM
from sample import multiplies_bf16
from text import TYPICAL_LENGTH

PAPER_FLOPS, MUSICGEN_FLOPS = 1e19, 1e20  # of the paper's runs, and MusicGen-small's (SSMTTM IV-A)
FLAN_T5_BASE = 109_628_544  # parameters of its encoder
RTX_3090 = 71e12  # FLOPs a second of its bf16 products, by its data sheet
UTILISATION = 0.4  # of the rate of matrix products, as training runs of this kind reach it


def parameters(config) -> int:
    with torch.device("meta"):
        model = Refiner(config) if isinstance(config, RefinerConfig) else MusicLM(config)
    return sum(p.numel() for p in model.parameters())


def memory(config, train, count, text_parameters, frames, batch) -> dict:
    """Bytes at the peak of a training step on one GPU, the end of its forward pass, by what needs
    them. `count` parameters; clips of `frames` frames, `batch` of them in a micro-batch."""
    refining = isinstance(config, RefinerConfig)
    name = "layers" if refining else "blocks"
    one, two = (kept(replace(config, **{name: n}), frames, batch, train.compile) for n in (1, 2))
    block, rest = two - one, 2 * one - two
    blocks, recompute = getattr(config, name), min(train.recompute, getattr(config, name))
    entered = (
        4 * batch * (frames + TYPICAL_LENGTH) * config.d_model
    )  # what a recomputed block keeps
    ema = 4 * count if train.ema else 0
    text = (16 if train.train_text_encoder else 2) * text_parameters
    return {
        "weights, gradients, AdamW": 16 * count + ema,
        "text encoder": text,
        "activations": rest + block * (blocks - recompute) + entered * recompute,
    }


def kept(config, frames, batch, compiled) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    refining = isinstance(config, RefinerConfig)
    # The kernels' operator keeps less than the PyTorch form; it is what runs on a GPU, and without
    # contents to work on, its signature is all that is asked of it.
    use_kernels = mock.patch.multiple(
        ssd_kernel, available=lambda x: True, triton=ssd_kernel.triton or "not asked either"
    )
    bf16 = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), use_kernels, bf16:
        model = (Refiner if refining else MusicLM)(config).train()
        if refining:
            x = torch.zeros(batch, (config.codebooks - 1) * config.code_dim, frames)
            t, text = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, config.d_text)
            coarse, sketched = torch.zeros(batch, config.code_dim, frames), torch.ones(batch) > 0
            inputs = x, t, coarse, text, sketched
        else:
            codes = torch.zeros(batch, config.codebooks, frames, dtype=torch.long)
            text = torch.zeros(batch, TYPICAL_LENGTH, config.d_text)
            inputs = codes, text, torch.ones(batch, TYPICAL_LENGTH, dtype=torch.bool)
        run = kept_compiled if compiled else kept_eager
        output, size = run(model, inputs)
        # The loss: logits in fp32, their softmax, and both once more on the way back.
        return size + 4 * 4 * output.numel()


def kept_eager(model, inputs):
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes, alive = {}, []

    def pack(v):
        alive.append(v)  # or another storage would get its address
        storage = v.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        output = model(*inputs)
    return output, sum(sizes.values())


def kept_compiled(model, inputs):
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    sizes = []

    def forward(graph, _):
        (outputs,) = graph.graph.find_nodes(op="output")
        for node in outputs.args[0]:
            value = getattr(node, "meta", {}).get("val")
            if isinstance(value, torch.Tensor) and node.op != "placeholder":
                sizes.append(value.numel() * value.element_size())
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    output = torch.compile(model, backend=backend, dynamic=False)(*inputs)
    return output, sum(sizes) - output.numel() * output.element_size()


def products_per_second(device, seconds=0.5) -> float:
    """FLOPs a second of a matrix product on this device, in the type that training uses."""
    size = 4096 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    F.linear(a, a)  # the first call is slow
    wait()
    count = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        F.linear(a, a)
        wait()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - begun)


def report(config, train, device) -> str:
    """The dry run of a config and a TrainConfig: cost, memory on a GPU, and hours."""
    count = parameters(config)
    tokens = seen_before(train.steps, train)[1]
    frames, batch = stages(train)[-1][1:]
    text_parameters = FLAN_T5_BASE  # which need not be at hand
    if train.text_encoder == "toy":
        from toy import corpus

        text_parameters = sum(p.numel() for p in corpus.text_encoder().parameters())
    parts = memory(config, train, count, text_parameters, frames, batch)
    total = sum(parts.values())
    line = f"memory on a GPU: {total / 1e9:.1f} GB"
    line += f" ({', '.join(f'{name} {size / 1e9:.1f}' for name, size in parts.items())})"
    line += "; --recompute BLOCKS trades time for memory, a smaller --batch with more --accumulate"
    line += " needs less, --fsdp shares weights among cards"
    rate = products_per_second(device)
    hours = [6 * count * tokens / (UTILISATION * r) / 3600 for r in (rate, RTX_3090)]
    here, there = (f"{60 * h:.1f} minutes" if h < 1 else f"{h:,.0f} hours" for h in hours)
    return (
        f"{describe_cost(config, train, text_parameters)}\n{line}\n"
        f"about {here} on one such {device.type}, at {UTILISATION:.0%} of the {rate / 1e12:.2f} "
        f"TFLOP/s of its matrix products; {there} on an RTX 3090 ({RTX_3090 / 1e12:.0f} TFLOP/s)"
    )


def describe_cost(config, train, text_parameters) -> str:
    """The first lines of every run: parameters, tokens and FLOPs (SSMTTM, [4] there)."""
    count = parameters(config)
    tokens = seen_before(train.steps, train)[1]
    trained = "trained too" if train.train_text_encoder else "frozen"
    return (
        f"{config.variant}, {config.blocks} blocks, {config.codebooks} codebook(s): "
        f"{count / 1e6:.2f} M parameters (text encoder {text_parameters / 1e6:.2f} M, {trained})\n"
        f"{train.steps:,} steps, {tokens:.2e} tokens, 6 x parameters x tokens = "
        f"{6 * count * tokens:.1e} FLOPs (the paper's runs {PAPER_FLOPS:.0e}, MusicGen-small "
        f"{MUSICGEN_FLOPS:.0e})"
    )
