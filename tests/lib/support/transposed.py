"""Print how many transposed register operands are found in a kernel that has one, compiled for Hopper.

The package's kernels must have none; this shows that one would be seen.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from palkernels.kernels.aot import transposed_register_dots


@triton.jit
def kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    product = tl.dot(a, b).to(tl.bfloat16)
    tl.store(c_ptr + offsets, tl.dot(tl.trans(product), b))


if __name__ == "__main__":
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "N": "constexpr"}
    source = ASTSource(kernel, signature, {(3,): 64})
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(transposed_register_dots(binary.asm["ttgir"]))
