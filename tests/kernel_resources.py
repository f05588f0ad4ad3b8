"""What the kernels of ssd_kernel.py need on each GPU: compiled here, without a GPU.

    python -m tests.kernel_resources                       the table in docs/kernel.md
    python -m tests.kernel_resources 86 float32 64 128     sm_86, x in fp32, P 64, N 128

Prints a line per kernel: bytes of shared memory per program, registers per thread, and the number
of instructions that spill registers to memory.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import ssd_kernel

# The most shared memory that one program may have, in bytes, by compute capability: the table
# "Technical Specifications per Compute Capability" of NVIDIA's CUDA programming guide.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def kernels(dtype, P, N, arch):
    """(name, kernel, constants, types) of all launches at one shape, H 32, chunks of 256. A
    constant None is an argument that is not given."""
    k, H = ssd_kernel, 32
    c = k.configurations(dtype, H, P, N, 256, SHARED_MEMORY[arch], arch // 10)
    names = "v w x dy own other CB dCB states S out".split()
    types = dict.fromkeys(names, TYPES[dtype]) | {"L": "i32", "chunks": "i32"}
    types["good"] = "*i32"
    nothing = lambda names: dict.fromkeys(names.split())
    for kernel, constants in [
        (k.states_kernel, c["states"] | dict(REVERSE=False) | nothing("first S")),
        (k.states_kernel, c["states"] | dict(REVERSE=True)),
        (k.output_kernel, c["output"] | dict(REVERSE=False) | nothing("first x ddt dD")),
        (k.output_kernel, c["output"] | dict(REVERSE=True)),
        (k.dcb_kernel, c["dcb"]),
        (k.dbc_kernel, c["dbc"] | dict(REVERSE=False)),
        (k.dbc_kernel, c["dbc"] | dict(REVERSE=True)),
    ]:  # fmt: skip
        name = kernel.__name__.removesuffix("_kernel") + "'" * constants.get("REVERSE", False)
        yield name, kernel, constants, types


def resources(kernel, constants, types, arch, folder):
    """(bytes of shared memory, registers per thread, spilling instructions), for sm_<arch>."""
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    signature, given, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            given[(i,)] = constants[name]
            continue
        signature[name] = types.get(name, "*fp32")
        if signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]  # as the launcher finds PyTorch's tensors
    source = ASTSource(kernel, signature, given, aligned)
    program = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(program.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    dump = lambda flag: subprocess.run([tool, flag, cubin], capture_output=True, text=True).stdout
    registers = int(re.search(r"REG:(\d+)", dump("-res-usage"))[1])
    return program.metadata.shared, registers, len(re.findall(r"\b(?:STL|LDL)\b", dump("-sass")))


def main(arch, dtype, P, N):
    with tempfile.TemporaryDirectory() as folder:
        for name, *kernel in kernels(getattr(torch, dtype), P, N, arch):
            shared, registers, spills = resources(*kernel, arch, folder)
            print(
                f"sm_{arch} {dtype} {name:8} {shared:7} B {registers:4} registers {spills} spills"
            )


if __name__ == "__main__":
    if len(sys.argv) == 5:
        main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        for arch in SHARED_MEMORY:
            main(arch, "bfloat16", 64, 512)
