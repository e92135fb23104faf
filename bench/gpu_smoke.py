"""Every CUDA kernel once on small awkward inputs, against the reference: the load for compute-sanitizer."""

import itertools

import torch

import effops
from effops import reference
from effops.testing import OP_DB, check_forward, check_gradients

LEVELS = [(7, 5), (3, 4), (1, 1)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def smoke_ms_deform_attn(dtype: torch.dtype, channels: int, points: int, deterministic: bool) -> None:
    generator = torch.Generator().manual_seed(channels + points)
    rows = sum(height * width for height, width in LEVELS)
    size = (2, 37, 3, len(LEVELS), points)
    value = torch.randn(2, rows, 3, channels, generator=generator)
    locations = torch.rand(*size, 2, generator=generator) * 1.4 - 0.2
    locations[0, 0] = torch.nan
    weights = torch.rand(size, generator=generator)
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [value.to("cuda", dtype), locations.to("cuda", coordinates), weights.to("cuda", coordinates)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    torch.use_deterministic_algorithms(deterministic)
    output = effops.ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    grad = torch.randn(output.shape, generator=generator).to(output)
    grads = torch.autograd.grad(output, leaves, grad)
    torch.use_deterministic_algorithms(False)

    exact_leaves = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    exact = reference.ms_deform_attn(exact_leaves[0], LEVELS, None, *exact_leaves[1:])
    exact_grads = torch.autograd.grad(exact, exact_leaves, grad.cpu().double())
    for name, ours, theirs in (
        ("output", output, exact),
        ("grad value", grads[0], exact_grads[0]),
        ("grad weights", grads[2], exact_grads[2]),  # that of locations jumps at pixel centres
    ):
        error = (ours.detach().cpu().double() - theirs).abs().max() / theirs.abs().max()
        if not error <= TOLERANCES[dtype]:
            raise SystemExit(
                f"{name}: error {error:.1e}, {dtype}, D={channels}, P={points}, {deterministic=}"
            )


def smoke_op_db() -> None:
    """The typical sample of every op, and those that take other paths through the kernels."""
    for info in OP_DB:
        for dtype, sizes in itertools.product(info.dtypes, (info.typical, *info.other_paths)):
            sample = info.build_sample(sizes, "cuda", dtype)
            check_forward(info, sample)
            if info.differentiable:
                check_gradients(info, sample)


def main() -> None:
    for case in itertools.product(TOLERANCES, (1, 32, 33, 64), (1, 4), (False, True)):
        smoke_ms_deform_attn(*case)
    smoke_op_db()
    torch.cuda.synchronize()
    print("smoke: all right")


if __name__ == "__main__":
    main()
