"""Every case of the CUDA kernels once: ``compute-sanitizer --tool memcheck python tests/native/sanitize_cuda.py``."""

import sys

import torch

from fused_margins.ops import cases, registry


def main() -> None:
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "float32")
    ran = 0
    for name in registry.OPS:
        if not registry._HAS_KERNEL[name, "cuda"]:
            continue
        op = cases.load(name)
        for case in op.CASES:
            inputs = case.make(torch.Generator().manual_seed(0))
            if name == "nearest" and inputs.get("relation", "same") != "same":
                continue
            inputs = cases.convert(inputs, dtype, "cuda")
            cases.evaluate(op, inputs, "cuda")
            for label in ("target", "clusters", "self_index"):  # labels out of range touch no memory either
                if name != "magnet" and isinstance(inputs.get(label), torch.Tensor) and inputs[label].numel():
                    bad = inputs[label].clone()
                    bad[0] = 10**9
                    cases.evaluate(op, inputs | {label: bad}, "cuda")
            ran += 1
    torch.cuda.synchronize()
    print(f"{ran} cases")
    assert ran > 50


if __name__ == "__main__":
    main()
