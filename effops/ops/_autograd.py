"""Installs the autograd of an op.

``torch.library.register_autograd`` doubles the cost of a call. :func:`install` puts an ordinary
``torch.autograd.Function`` at the op's Autograd key instead, which runs the op under a guard that skips
that key. The guard is private to torch (it is there in 2.11 to 2.14); without it
``register_autograd`` is used.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

library = torch.library.Library("effops", "FRAGMENT")

Context = Any  # what torch.autograd.Function passes as ctx
Gradients = Sequence[Tensor | None]


def install(
    name: str,
    save: Callable[[Context, tuple[Any, ...], Any], None],
    backward: Callable[..., Gradients],
    differentiable: tuple[int, ...],
    *,
    adapt: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
    use_guard: bool = hasattr(torch._C, "_AutoDispatchBelowAutograd"),
) -> None:
    """Makes ``effops::<name>`` differentiable.

    ``differentiable`` names the positions of the inputs that can need a gradient (tensors or None).
    ``save(ctx, inputs, output)`` keeps what ``backward(ctx, *grad_outputs)`` needs; that returns one
    gradient, or None, per input. ``adapt(inputs)`` makes the inputs of the calls that will be differentiated,
    where the op must be told to keep something for that (``register_autograd`` cannot do it: there the caller
    has to).
    """
    op = getattr(torch.ops.effops, name).default
    if not use_guard:
        torch.library.register_autograd(
            f"effops::{name}", backward, setup_context=lambda ctx, inputs, output: save(ctx, inputs, output)
        )
        return
    below_autograd = torch._C._AutoDispatchBelowAutograd
    is_grad_enabled = torch.is_grad_enabled

    def forward(ctx: Context, *inputs: Any) -> Any:
        if adapt is not None:
            inputs = adapt(inputs)
        with below_autograd():
            output = op(*inputs)
        save(ctx, inputs, output)
        return output

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def kernel(*inputs: Any) -> Any:
        if is_grad_enabled():
            for position in differentiable:
                value = inputs[position]
                if value is not None and value.requires_grad:
                    return function.apply(*inputs)
        with below_autograd():
            return op(*inputs)

    library.impl(name, kernel, "Autograd")


def refuse_second_derivatives(name: str, differentiable: tuple[int, ...]) -> None:
    """Makes differentiating ``effops::<name>_backward`` an error instead of silent zeros."""

    def refuse(ctx: Context, *grad_outputs: Tensor) -> Gradients:
        raise RuntimeError(f"{name}: second derivatives are not supported")

    install(f"{name}_backward", lambda ctx, inputs, output: None, refuse, differentiable)


def refuse_second_derivatives_of_lists(name: str) -> None:
    """The same for an op that takes lists of tensors, whose autograd is not installed by :func:`install`."""

    def refuse(ctx: Context, *grad_outputs: Any) -> NoReturn:
        raise RuntimeError(f"{name}: second derivatives are not supported")

    torch.library.register_autograd(f"effops::{name}_backward", refuse)


def materialize(
    grad_outputs: Sequence[Tensor | None], shapes: Sequence[Sequence[int]]
) -> list[Tensor] | None:
    """Gradients of outputs of the given shapes, zeros where there is none; None if there is none at all.

    For ops with integer outputs, for which torch would make zeros too: ``ctx.set_materialize_grads(False)``.
    """
    like = next((gradient for gradient in grad_outputs if gradient is not None), None)
    if like is None:
        return None
    return [
        like.new_zeros(shape) if gradient is None else gradient
        for gradient, shape in zip(grad_outputs, shapes, strict=True)
    ]
