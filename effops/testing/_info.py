"""What the property tests know about an op: :class:`OpInfo`, its samples and its wrong inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from effops import ops, reference
from effops.testing._layouts import LAYOUTS, STRIDE_ZERO

Kind = Literal["ordinary", "awkward", "empty", "strided"]
Sizes = Mapping[str, int]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SampleInput:
    """Arguments that an op accepts.

    ``kind`` is ordinary (all of an op's ordinary samples have one structure and differ only in the sizes
    that ``OpInfo.dynamic`` names), awkward, empty or strided. ``smooth`` says that the op is differentiable
    in a neighbourhood of the inputs, so that finite differences can be taken.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "ordinary"
    smooth: bool = True

    def map(self, change: Callable[[Tensor], Tensor]) -> SampleInput:
        """The sample with every tensor changed, those in lists included."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def map_floating(self, change: Callable[[Tensor], Tensor]) -> SampleInput:
        """The sample with every floating-point tensor changed."""
        return self.map(lambda tensor: change(tensor) if tensor.is_floating_point() else tensor)


@dataclass(frozen=True)
class ErrorInput:
    """Arguments that an op must refuse.

    ``match`` is a regular expression for the message, which names the op and the argument.
    ``needs_values`` says that only the tensors' values are wrong: CPU kernels raise, while fake and CUDA
    kernels cannot see it. ``native`` says that ``torch.ops.effops.<name>`` must refuse the arguments too, and
    ``backward`` the same of the backward op, which need not get all of them.
    """

    name: str
    args: tuple[Any, ...]
    error: type[Exception] | tuple[type[Exception], ...]
    match: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    needs_values: bool = False
    native: bool = True
    backward: bool = True

    @property
    def on_one_device(self) -> bool:
        """No tensor is on another device (the meta device, which every machine has)."""
        values = tree_leaves((self.args, dict(self.kwargs)))
        return not any(isinstance(value, Tensor) and value.is_meta for value in values)

    @property
    def seen_by_backward(self) -> bool:
        """The kernels of one device see the arguments, also those of the backward op."""
        return self.native and self.backward and self.on_one_device

    @property
    def seen_by_fake_kernel(self) -> bool:
        """The metadata of the tensors, all on one device, are enough to refuse them."""
        return self.on_one_device and not self.needs_values


@dataclass(frozen=True)
class Tolerance:
    """Largest error relative to the largest expected element; half of it bounds the error's norm."""

    forward: float
    gradient: float


# Accumulation in float32 (float64 for float64) and one rounding to the dtype, of 2^-11 or 2^-8.
DEFAULT_TOLERANCES: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(1e-5, 1e-5),
        torch.float16: Tolerance(1e-3, 1e-3),
        torch.bfloat16: Tolerance(8e-3, 8e-3),
    }
)


EXACT = Tolerance(0.0, 0.0)  # of integers


class Maker:
    """Draws the tensors of a sample: the same numbers on every device, rounded to the dtype."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed numbers."""
        return self._finish(torch.randn(shape, generator=self._generator, dtype=torch.float64))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers evenly spread over [low, high)."""
        unit = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return self._finish(low + (high - low) * unit)

    def choice(self, options: Sequence[float], *shape: int) -> Tensor:
        """Numbers picked from the options."""
        picks = torch.randint(len(options), shape, generator=self._generator)
        return self._finish(torch.tensor(options, dtype=torch.float64)[picks])

    def integers(self, *shape: int, high: int) -> Tensor:
        """int64 numbers in [0, high); zeros where that is empty."""
        return torch.randint(max(high, 1), shape, generator=self._generator).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """The int64 numbers below count in a random order."""
        return torch.randperm(count, generator=self._generator).to(self.device)

    def bits(self, *shape: int, ones: float = 0.5) -> Tensor:
        """Booleans, of which the given share is True."""
        return (torch.rand(shape, generator=self._generator, dtype=torch.float64) < ones).to(self.device)

    def int64(self, data: Sequence[Any]) -> Tensor:
        """The data as an int64 tensor on the device."""
        return torch.tensor(data, dtype=torch.int64, device=self.device)

    def _finish(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).to(self.device)


def _same(result: Any) -> Any:
    return result


def _parts(name: str, value: Any) -> dict[str, Any]:
    """What an argument consists of, by label: the items of a list, the fields of a dataclass, or itself."""
    if isinstance(value, (list, tuple)):
        return {f"{name}[{i}]": item for i, item in enumerate(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f"{name}.{part.name}": getattr(value, part.name) for part in dataclasses.fields(value)}
    return {name: value}


@dataclass(frozen=True, kw_only=True, eq=False)
class OpInfo:
    """Everything that the property tests need to know about one op. Arguments go by their names.

    A tensor inside a list or a dataclass has a label of its own: ``"pyramid[1]"``, ``"sps.active"``; an
    argument's name stands for all its tensors. Sizes are named numbers that ``build`` turns into a sample.
    """

    name: str
    #: Draws a sample of the given sizes, any of which may be 0 where `size_ranges` says so.
    build: Callable[[Maker, Sizes], SampleInput]
    #: Sizes that random samples are drawn from.
    size_ranges: Mapping[str, range]
    #: For tests that need one sample: a usual one; the smallest (Inductor, AOTInductor, golden FLOPs); and
    #: some whose work is split over several threads in every direction in which the kernels split it.
    typical: Sizes
    smallest: Sizes
    large: tuple[Sizes, ...]
    #: Small samples that take other paths through the kernels than the typical one does.
    other_paths: tuple[Sizes, ...] = ()
    #: Ordinary, awkward and empty samples; strided ones are made from the first ordinary one.
    draw_samples: Callable[[Maker], Iterator[SampleInput]]
    #: At least 20 wrong inputs.
    draw_errors: Callable[[Maker], Iterator[ErrorInput]]
    #: Positional arguments of torch.ops.effops.<name>, from the arguments of the public function.
    native_args: Callable[..., tuple[Any, ...]]
    #: Arguments of torch.ops.effops.<name>_backward from (gradients of the outputs, native arguments).
    backward_args: Callable[[Sequence[Tensor], tuple[Any, ...]], tuple[Any, ...]] | None
    #: What the op computed, of the result of the public function or of its definition.
    computed: Callable[[Any], Any] = _same
    #: The same, of the result of ``torch_op``, which may keep something for the backward op.
    native_computed: Callable[[Any], Any] = _same
    #: Arguments that get gradients.
    differentiable: tuple[str, ...]
    #: Those on which no gradient depends, so that second derivatives are zeros in truth.
    constant_gradients: tuple[str, ...] = ()
    #: Arguments in which the op is linear, each with the others held fixed.
    linear_in: tuple[str, ...] = ()
    #: How many of the results, from the first on, are linear in them; None: all.
    linear_outputs: int | None = None
    #: Coordinates, and which of their last dimension may be NaN or Inf (contribution and gradient 0).
    coordinates: Mapping[str, slice] = field(default_factory=dict)
    #: Special numbers of arguments that leave nothing but rounding errors, or overflow, for some sizes.
    untried: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    #: Arguments that may stay float32 beside half-precision values.
    float32_beside_half: tuple[str, ...] = ()
    #: Results may be float32 where the values are half precision.
    float32_results: bool = False
    #: The torch op takes batches of float32 and float64 only: the public function casts half precision and
    #: rounds the result, and makes a batch of a single set.
    native_is_narrow: bool = False
    #: Autocast: "cast" to its dtype or "float32"; arguments not named stay as they are.
    autocast: Mapping[str, Literal["cast", "float32"]] = field(default_factory=dict)
    #: Arguments that vmap can batch, and tensors that it must refuse to batch.
    vmap_batched: tuple[str, ...] = ()
    vmap_shared: tuple[str, ...] = ()
    #: Names of the sizes that may vary: {label: {dimension: name}}. In the first ordinary sample each must
    #: differ from every other size: torch.compile gives equal sizes one symbol and fixes them together.
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    #: FLOPs of forward, and of backward for all gradients, of the smallest sample.
    flops: tuple[int, int] = (0, 0)
    #: Of the data, the usual one first.
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    tolerances: Mapping[torch.dtype, Tolerance] = field(default_factory=lambda: DEFAULT_TOLERANCES)
    #: Of float32 results and gradients where an input is half precision; None: as of all float32 ones.
    tolerance_beside_half: Tolerance | None = None
    #: Errors are measured against no less than this: a result that vanishes, such as the gradient of a
    #: softmax over one tap, is as exact as the terms that cancel.
    smallest_scale: float = 0.0
    #: The argument [N, C, H, W] whose gradient and, beside it, the result are channels_last if it is
    #: channels_last and not contiguous at the same time; all other results are contiguous.
    keeps_channels_last: str = ""
    #: Other arguments [N, C, H, W] whose gradients are channels_last by the same rule, each by its own.
    own_formats: tuple[str, ...] = ()
    #: The shape of the result depends on values: no vmap rule, no static-dispatch test.
    data_dependent_shape: bool = False

    @property
    def op(self) -> Callable[..., Any]:
        """The public function."""
        function: Callable[..., Any] = getattr(ops, self.name)
        return function

    @property
    def reference(self) -> Callable[..., Any]:
        """The definition in pure PyTorch."""
        function: Callable[..., Any] = getattr(reference, self.name)
        return function

    @property
    def torch_op(self) -> Any:
        """``torch.ops.effops.<name>.default``."""
        return getattr(torch.ops.effops, self.name).default

    @property
    def backward_op(self) -> Any:
        """``torch.ops.effops.<name>_backward.default``."""
        return getattr(torch.ops.effops, f"{self.name}_backward").default

    @property
    def has_floating_data(self) -> bool:
        """Whether there are numbers that can be rounded, NaN or Inf."""
        return any(dtype.is_floating_point for dtype in self.dtypes)

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether the shapes of the results follow from those of the arguments."""
        return not self.data_dependent_shape

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype in which results have the smallest errors."""
        return torch.float64 if self.has_floating_data else self.dtypes[0]

    def tolerance(self, dtype: torch.dtype, sample: SampleInput | None = None) -> Tolerance:
        """Of results of the dtype, and of what the sample's inputs are."""
        beside_half = self.tolerance_beside_half
        if beside_half is not None and sample is not None and dtype == torch.float32:
            is_half = (tensor.dtype in HALF_DTYPES for tensor in self.tensors(sample).values())
            return beside_half if any(is_half) else self.tolerances[dtype]
        return self.tolerances[dtype] if dtype.is_floating_point else EXACT

    # ------------------------------------------------------------------------------------ samples

    def samples(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
        seed: int = 0,
    ) -> Iterator[SampleInput]:
        """All samples: those of the entry, then the first ordinary one in every layout."""
        first: SampleInput | None = None
        for sample in self.draw_samples(Maker(device, dtype or self.dtypes[0], seed)):
            first = first or sample
            yield self.requiring_grad(sample) if requires_grad else sample
        assert first is not None
        for layout, change in LAYOUTS.items():
            sample = first.map_floating(change) if layout in STRIDE_ZERO else first.map(change)
            sample = replace(sample, name=f"strided_{layout}", kind="strided")
            yield self.requiring_grad(sample) if requires_grad else sample

    def sample(
        self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> SampleInput:
        """The sample of that name."""
        return next(sample for sample in self.samples(device, dtype) if sample.name == name)

    @cached_property
    def sample_kinds(self) -> dict[str, Kind]:
        """Names of the samples, and their kinds."""
        return {sample.name: sample.kind for sample in self.samples()}

    def build_sample(
        self,
        sizes: Sizes,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> SampleInput:
        """A sample of the given sizes."""
        return self.build(Maker(device, dtype or self.dtypes[0], seed), sizes)

    def error_inputs(self, device: str | torch.device = "cpu") -> Iterator[ErrorInput]:
        """The wrong inputs, with data of the usual dtype."""
        yield from self.draw_errors(Maker(device, self.dtypes[0]))

    # ------------------------------------------------------------------------------------ arguments

    def native(self, sample: SampleInput | ErrorInput) -> tuple[Any, ...]:
        """The sample's arguments for ``torch_op``."""
        return self.native_args(*sample.args, **sample.kwargs)

    def tensors(self, sample: SampleInput, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The tensors among the arguments (those of the given names) by label, in argument order."""
        found: dict[str, Tensor] = {}
        for name, value in self._bind(sample).arguments.items():
            for label, item in _parts(name, value).items():
                if isinstance(item, Tensor) and (names is None or name in names or label in names):
                    found[label] = item
        return found

    def leaves(self, sample: SampleInput) -> dict[str, Tensor]:
        """The tensors that get gradients, by label; a mask of booleans, say, gets none."""
        found = self.tensors(sample, self.differentiable)
        return {label: tensor for label, tensor in found.items() if tensor.is_floating_point()}

    @property
    def has_second_derivatives(self) -> bool:
        """Whether some gradient depends on some input, so that its derivative must be refused."""
        return not set(self.differentiable) <= set(self.constant_gradients)

    def replaced(self, sample: SampleInput, changes: Mapping[str, Any]) -> SampleInput:
        """The sample with other tensors at the given labels."""
        bound = self._bind(sample)
        for name, value in bound.arguments.items():
            parts = [changes.get(label, part) for label, part in _parts(name, value).items()]
            if name in changes:
                bound.arguments[name] = changes[name]
            elif isinstance(value, (list, tuple)):
                bound.arguments[name] = type(value)(parts)
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                bound.arguments[name] = type(value)(*parts)
        return replace(sample, args=bound.args, kwargs=bound.kwargs)

    def requiring_grad(self, sample: SampleInput) -> SampleInput:
        """The sample with fresh leaves that need gradients, in the same layout."""
        leaves = self.leaves(sample).items()
        return self.replaced(sample, {label: leaf.detach().requires_grad_() for label, leaf in leaves})

    def _bind(self, sample: SampleInput) -> inspect.BoundArguments:
        return inspect.signature(self.op).bind(*sample.args, **sample.kwargs)
