"""Golden values of perforated_conv2d and plan_mask: dense convolutions, and neighbours found by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients, random_mask

import effops

IDENTITY = torch.ones(1, 1, 1, 1, dtype=torch.float64)
FILLS = pytest.mark.parametrize("fill", ["zero", "keep", "nearest"])
GEOMETRIES = pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), 1, 1, 1, 1),
        ((3, 3), 1, 1, 1, 4),  # depthwise
        ((1, 1), 1, 0, 1, 1),
        ((3, 3), 2, 1, 1, 2),
        ((3, 3), 1, 2, 2, 1),
        ((2, 4), 1, 0, 1, 1),
        ((3, 2), (1, 2), (3, 0), (2, 1), 2),
        ((5, 3), (3, 2), (4, 5), (2, 3), 1),
    ],
    ids=str,
)


def random_float_mask(*shape, seed=0):
    """With zeros and negative numbers."""
    return double(*shape, seed=seed) * random_mask(*shape, seed=seed)


def base_of(fill, out_shape):
    return double(*out_shape, seed=9) if fill == "keep" else None


def nearest_by_loops(mask):
    """Oracle: for each position [N, H, W] the flat position of the nearest kept one in its image, or -1."""
    _, height, width = mask.shape
    out = torch.full(mask.shape, -1)
    for n, y, x in itertools.product(*map(range, mask.shape)):
        kept = [
            ((y - v) ** 2 + (x - u) ** 2, (n * height + v) * width + u)
            for v, u in itertools.product(range(height), range(width))
            if mask[n, v, u]
        ]
        if kept:
            out[n, y, x] = min(kept)[1]
    return out


def numbered(*shape):
    """An image [N, 1, H, W] in which each pixel holds its flat position."""
    return torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).view(shape).unsqueeze(1)


# ------------------------------------------------------------------------------------ dense convolutions


@GEOMETRIES
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("planned", [False, True], ids=["mask", "plan"])
def test_agrees_with_masked_dense_convolution(
    perforated_conv2d, plan_mask, planned, kind, kernel, stride, padding, dilation, groups
):
    """A float mask gets no gradient where it is 0, unlike a factor of a product."""
    x = double(2, 4, 9, 11).requires_grad_()
    weight = double(8, 4 // groups, *kernel, seed=1).requires_grad_()
    bias = double(8, seed=2).requires_grad_()
    geometry = (stride, padding, dilation, groups)
    dense = F.conv2d(x, weight, bias, *geometry)
    shape = (2, *dense.shape[2:])
    mask = random_mask(*shape) if kind == "bool" else random_float_mask(*shape).requires_grad_()
    leaves = [x, weight, bias] + ([mask] if kind == "float" else [])

    out = perforated_conv2d(x, weight, plan_mask(mask) if planned else mask, bias, *geometry)
    expected = dense * mask[:, None]
    assert_near(out, expected)
    grad_output = double(*out.shape, seed=3)
    wanted = list(gradients(expected, leaves, grad_output))
    if kind == "float":
        wanted[3] = torch.where(mask != 0, wanted[3], 0.0)
    for actual, gradient in zip(gradients(out, leaves, grad_output), wanted, strict=True):
        assert_near(actual, gradient)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_keep(perforated_conv2d, kind):
    """The base shows, and gets its gradient, where the mask is 0, whatever it holds elsewhere."""
    x, weight = double(2, 3, 5, 6).requires_grad_(), double(4, 3, 3, 3, seed=1).requires_grad_()
    mask = random_mask(2, 5, 6) if kind == "bool" else random_float_mask(2, 5, 6)
    kept = (mask != 0)[:, None]
    base = torch.where(kept, NAN, double(2, 4, 5, 6, seed=2)).requires_grad_()
    out = perforated_conv2d(x, weight, mask, padding=1, fill="keep", base=base)
    expected = torch.where(kept, F.conv2d(x, weight, padding=1) * mask[:, None], base)
    assert_near(out, expected)
    grad_output = double(*out.shape, seed=3)
    leaves = [x, weight, base]
    actual, wanted = (gradients(result, leaves, grad_output) for result in (out, expected))
    for got, gradient in zip(actual, wanted, strict=True):
        assert_near(got, gradient)
    assert torch.equal(actual[2], torch.where(kept, 0.0, grad_output))


@FILLS
def test_nothing_kept(perforated_conv2d, fill):
    x = torch.full((2, 3, 5, 6), NAN, dtype=torch.float64, requires_grad=True)
    weight = torch.full((4, 3, 3, 3), INF, dtype=torch.float64, requires_grad=True)
    bias = torch.full((4,), NAN, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 5, 6, requires_grad=True)
    base = base_of(fill, (2, 4, 5, 6))
    out = perforated_conv2d(x, weight, mask, bias, padding=1, fill=fill, base=base)
    assert torch.equal(out, torch.zeros_like(out) if base is None else base)
    for gradient in gradients(out, [x, weight, bias, mask]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@FILLS
def test_everything_kept(perforated_conv2d, fill):
    x, weight, bias = double(2, 3, 5, 6), double(4, 3, 3, 3, seed=1), double(4, seed=2)
    base = base_of(fill, (2, 4, 5, 6))
    expected = F.conv2d(x, weight, bias, padding=1)
    for mask in (torch.ones(2, 5, 6, dtype=torch.bool), torch.ones(2, 5, 6, dtype=torch.float64)):
        out = perforated_conv2d(x, weight, mask, bias, padding=1, fill=fill, base=base)
        assert_near(out, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", [torch.float32, None], ids=["float32", "same"])
def test_dtypes_by_hand(perforated_conv2d, dtype, mask_dtype):
    """The sum of 3 x 3 pixels of a 3 x 3 image, plus 1, times 0.5, 0, -2 on the middle row."""
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3).to(dtype)
    mask = torch.tensor([[[0, 0, 0], [0.5, 0, -2], [0, 0, 0]]], dtype=mask_dtype or dtype)
    weight, bias = torch.ones(1, 1, 3, 3, dtype=dtype), torch.ones(1, dtype=dtype)
    out = perforated_conv2d(x, weight, mask, bias, padding=1)
    assert out.dtype == dtype
    assert out.tolist() == [[[[0, 0, 0], [14, 0, -68], [0, 0, 0]]]]


# ------------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[0, 1, 0, 0, 0, 1, 0]], [[1, 1, 1, 1, 5, 5, 5]]),  # 3 lies between: the lower one
        ([[1, 0, 1], [0, 0, 0], [1, 0, 1]], [[0, 0, 2], [0, 0, 2], [6, 6, 8]]),
        ([[0, 1, 0], [1, 0, 1], [0, 1, 0]], [[1, 1, 1], [3, 1, 5], [3, 7, 5]]),  # by rows, then columns
        ([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], [[10, 3, 3, 3], [10, 10, 10, 3], [10] * 4]),
        ([[0, 0], [0, 0], [0, 1]], [[5, 5], [5, 5], [5, 5]]),
    ],
    ids=["row", "corners", "cross", "Euclidean", "single"],
)
def test_nearest_by_hand(perforated_conv2d, plan_mask, mask, expected):
    """In "Euclidean", (0, 0) is nearer to (2, 2) than to (0, 3), whose city-block distance is less."""
    mask = torch.tensor([mask], dtype=torch.bool)
    for given in (mask, plan_mask(mask)):
        out = perforated_conv2d(numbered(*mask.shape), IDENTITY, given, fill="nearest")
        assert out[0, 0].tolist() == expected


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 1, 20), (2, 16, 3)], ids=str)
def test_nearest_agrees_with_loops(perforated_conv2d, shape, density):
    mask = random_mask(*shape, density=density)
    source = nearest_by_loops(mask)
    out = perforated_conv2d(numbered(*shape) + 1, IDENTITY, mask, fill="nearest")
    assert torch.equal(out[:, 0], source.double() + 1)  # 0 where there is none


def test_nearest_stays_in_its_image(perforated_conv2d):
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[0, 1, 1] = mask[2, 0, 0] = True
    out = perforated_conv2d(numbered(3, 2, 2), IDENTITY, mask, fill="nearest")
    assert out.flatten().tolist() == [3] * 4 + [0] * 4 + [8] * 4


def test_nearest_gradients_by_hand(perforated_conv2d):
    """Positions 0 to 3 show the result at 1, 4 to 6 that at 5."""
    x = torch.arange(7.0).double().view(1, 1, 1, 7).requires_grad_()
    mask = torch.tensor([[[0, 2.0, 0, 0, 0, -1.0, 0]]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[[[3.0]]]], dtype=torch.float64, requires_grad=True)
    out = perforated_conv2d(x, weight, mask, bias, fill="nearest")
    assert out.flatten().tolist() == [8, 8, 8, 8, -16, -16, -16]
    grads = gradients(out, [x, weight, mask, bias], torch.arange(1.0, 8.0).double().view(out.shape))
    reaching = 1 + 2 + 3 + 4, 5 + 6 + 7
    assert grads[0].flatten().tolist() == [0, 3 * 2 * reaching[0], 0, 0, 0, -3 * reaching[1], 0]
    assert grads[1].item() == 2 * reaching[0] - 5 * reaching[1]
    assert grads[2].flatten().tolist() == [0, 4 * reaching[0], 0, 0, 0, 16 * reaching[1], 0]
    assert grads[3].item() == 2 * reaching[0] - reaching[1]


def test_nearest_agrees_with_a_dense_convolution(perforated_conv2d):
    """Of which each position reads the nearest kept one; all gradients."""
    x, weight = double(2, 4, 6, 7).requires_grad_(), double(6, 2, 3, 3, seed=1).requires_grad_()
    bias, mask = double(6, seed=2).requires_grad_(), random_float_mask(2, 3, 4).requires_grad_()
    geometry = (2, 1, 1, 2)
    out = perforated_conv2d(x, weight, mask, bias, *geometry, fill="nearest")
    dense = F.conv2d(x, weight, bias, *geometry) * mask[:, None]
    source = nearest_by_loops(mask != 0)
    assert (source >= 0).all()
    expected = dense.permute(0, 2, 3, 1).flatten(0, 2)[source].permute(0, 3, 1, 2)
    assert_near(out, expected)
    leaves, grad_output = [x, weight, bias, mask], double(*out.shape, seed=3)
    for actual, wanted in zip(
        gradients(out, leaves, grad_output), gradients(expected, leaves, grad_output), strict=True
    ):
        assert_near(actual, wanted)


# ------------------------------------------------------------------------------------ NaN and Inf


@FILLS
@pytest.mark.parametrize("number", [NAN, INF])
def test_what_is_not_read_changes_nothing(perforated_conv2d, fill, number):
    """Pixels out of reach of all kept positions, with stride and dilation."""
    mask = torch.zeros(2, 4, 4)
    mask[0, 1, 1] = mask[1, 0, 3] = 2.0
    read = torch.zeros(2, 1, 8, 8)
    for n, y, x in mask.nonzero().tolist():
        for v, u in itertools.product(range(3), range(3)):
            row, column = 2 * y - 2 + 2 * v, 2 * x - 2 + 2 * u
            if 0 <= row < 8 and 0 <= column < 8:
                read[n, 0, row, column] = 1
    clean = double(2, 3, 8, 8)
    found = []
    for x in (clean, torch.where(read > 0, clean, number)):
        leaves = [x.requires_grad_(), double(4, 3, 3, 3, seed=1).requires_grad_(), mask.requires_grad_()]
        base = base_of(fill, (2, 4, 4, 4))
        out = perforated_conv2d(*leaves, None, 2, 2, 2, fill=fill, base=base)
        found.append([out, *gradients(out, leaves)])
    for actual, wanted in zip(*found, strict=True):
        assert torch.equal(actual, wanted)
        assert actual.isfinite().all()


def test_padding_is_never_multiplied(perforated_conv2d):
    """A tap of Inf or NaN that only reads padding: no influence, gradient 0."""
    x = torch.tensor([[[[5.0]]]], dtype=torch.float64, requires_grad=True)
    weight = torch.full((1, 1, 3, 3), INF, dtype=torch.float64)
    weight[0, 0, 0] = NAN
    weight[0, 0, 1, 1] = 2.0
    weight.requires_grad_()
    out = perforated_conv2d(x, weight, torch.ones(1, 1, 1, dtype=torch.bool), padding=1)
    assert out.item() == 10
    grad_x, grad_weight = gradients(out, [x, weight])
    assert grad_x.item() == 2
    assert grad_weight.flatten().tolist() == [0, 0, 0, 0, 5, 0, 0, 0, 0]


def test_mask_of_nan_is_kept(perforated_conv2d, plan_mask):
    mask = torch.tensor([[[NAN, 0.0, -0.0, INF]]], dtype=torch.float64)
    assert plan_mask(mask).positions.tolist() == [0, 3]
    out = perforated_conv2d(torch.ones(1, 1, 1, 4).double(), IDENTITY, mask)
    assert out.isnan().flatten().tolist() == [True, False, False, False]
    assert out.flatten()[1:].tolist() == [0, 0, INF]


# ------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("dtype", [torch.bool, *FLOATS])
def test_plan_by_hand(plan_mask, dtype):
    mask = torch.tensor([[[0, 1, 1], [0, 0, 0]], [[1, 0, 0], [0, 0, 1]]], dtype=dtype)
    plan = plan_mask(mask)
    assert torch.equal(plan.mask, mask)
    assert plan.positions.tolist() == [1, 2, 6, 11]
    assert plan.rows.tolist() == [[[-1, 0, 1], [-1, -1, -1]], [[2, -1, -1], [-1, -1, 3]]]
    assert plan.positions.dtype == plan.rows.dtype == torch.int64
    assert plan.count == 4
    assert plan.density == pytest.approx(1 / 3)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_plan_of_nothing(plan_mask, shape):
    plan = plan_mask(torch.ones(shape))
    assert (plan.count, plan.density, plan.rows.shape) == (0, 0.0, shape)


def test_plan_reuse(perforated_conv2d, plan_mask):
    """A bottleneck of 1 x 1, 3 x 3 and 1 x 1 on one plan, against the mask in each layer."""
    mask = random_float_mask(2, 6, 5).requires_grad_()
    weights = [
        double(*shape, seed=i).requires_grad_()
        for i, shape in enumerate([(2, 4, 1, 1), (2, 2, 3, 3), (4, 2, 1, 1)])
    ]
    found = []
    for given in (plan_mask(mask), mask):
        y = x = double(2, 4, 6, 5, seed=5).requires_grad_()
        for weight in weights:
            y = perforated_conv2d(y, weight, given, padding=weight.shape[-1] // 2).relu()
        y = perforated_conv2d(y, weights[0], given, stride=1, fill="nearest")
        found.append([y, *gradients(y, [x, mask, *weights], double(*y.shape, seed=6))])
    for actual, wanted in zip(*found, strict=True):
        assert_near(actual, wanted)
    assert found[0][2].any()


def test_plan_repr_and_pytree(plan_mask):
    plan = plan_mask(torch.eye(3)[None])
    assert repr(plan) == "MaskPlan(count=3, images=1, height=3, width=3, dtype=float32, device=cpu)"
    moved = plan.to("meta")
    assert repr(moved) == "MaskPlan(count=3, images=1, height=3, width=3, dtype=float32, device=meta)"
    leaves, spec = torch.utils._pytree.tree_flatten([plan])
    assert len(leaves) == 3
    (again,) = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, effops.MaskPlan)
    assert again.mask is plan.mask
    assert repr(replace(plan, mask=None, rows=1)) == "MaskPlan(mask=None, positions=Tensor[3], rows=1)"


# ------------------------------------------------------------------------------------ forms


@FILLS
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_format(perforated_conv2d, fill, channels):
    """Channels_last for an input that is channels_last and nothing else; a single channel is both."""
    x = double(2, channels, 4, 5)
    weight, mask = double(6, channels, 3, 3, seed=1), random_mask(2, 4, 5)
    base = base_of(fill, (2, 6, 4, 5))
    out = perforated_conv2d(x, weight, mask, padding=1, fill=fill, base=base)
    assert out.is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    last = perforated_conv2d(x, weight, mask, padding=1, fill=fill, base=base)
    assert last.is_contiguous(memory_format=torch.channels_last) == (channels > 1)
    assert_near(last, out)


@pytest.mark.parametrize("empty", ["N", "I", "O"])
@FILLS
def test_empty(perforated_conv2d, empty, fill):
    n, i, o = (0 if name == empty else 2 for name in "NIO")
    x, weight = torch.ones(n, i, 4, 5, requires_grad=True), torch.ones(o, i, 3, 3, requires_grad=True)
    bias, mask = torch.ones(o, requires_grad=True), torch.ones(n, 4, 5, requires_grad=True)
    base = base_of(fill, (n, o, 4, 5))
    base = None if base is None else base.float()
    out = perforated_conv2d(x, weight, mask, bias, padding=1, fill=fill, base=base)
    assert out.shape == (n, o, 4, 5)
    assert torch.equal(out, torch.ones_like(out))
    grads = gradients(out, [x, weight, bias, mask])
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in (x, weight, bias, mask)]
    assert torch.equal(grads[2], torch.full((o,), 20.0 * n))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 4, 5)},
        {"weight": torch.zeros(4, 3, 3, 3)},
        {"weight": torch.zeros(4, 4, 3)},
        {"mask": torch.zeros(2, 5, 4)},
        {"mask": torch.zeros(5, 5)},
        {"bias": torch.zeros(3)},
        {"stride": 0},
        {"padding": -1},
        {"dilation": 0},
        {"groups": 3},
        {"groups": 0},
        {"dilation": 4},  # does not fit into the padded map
        {"fill": "mean"},
        {"fill": "keep"},
        {"base": torch.zeros(2, 4, 5, 5)},
        {"fill": "keep", "base": torch.zeros(2, 4, 5, 4)},
        {"stride": (1, 2)},  # another size than the mask's
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(perforated_conv2d, change):
    arguments = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(4, 4, 3, 3),
        "mask": torch.zeros(2, 5, 5),
    }
    with pytest.raises(ValueError, match="^perforated_conv2d: expected"):
        perforated_conv2d(**(arguments | {"padding": 1} | change))


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.zeros(4, 4, 3, 3).double()},
        {"bias": torch.zeros(4).double()},
        {"mask": torch.zeros(2, 5, 5).double()},
        {"mask": torch.zeros(2, 5, 5).int()},
        {"x": torch.zeros(2, 4, 5, 5).int()},
        {"fill": "keep", "base": torch.zeros(2, 4, 5, 5).half()},
    ],
    ids=lambda change: "-".join(change),
)
def test_wrong_dtypes(perforated_conv2d, change):
    arguments = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(4, 4, 3, 3),
        "mask": torch.zeros(2, 5, 5),
    }
    with pytest.raises(TypeError, match="^perforated_conv2d: expected"):
        perforated_conv2d(**(arguments | {"padding": 1} | change))


def test_large_masks_leave_out_what_they_skip():
    """Large enough for the dense convolution of the CPU, whose gradients would multiply every pixel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 20, 20, generator=generator)
    x[:, :, 1, 1] = torch.nan
    weight = torch.randn(32, 32, 3, 3, generator=generator)
    mask = torch.ones(1, 20, 20, dtype=torch.bool)
    mask[:, :4, :4] = False
    leaves = x.requires_grad_(), weight.requires_grad_()
    out = effops.perforated_conv2d(*leaves, mask, padding=1)
    assert bool(out.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in torch.autograd.grad(out.sum(), leaves))


def test_deterministic_algorithms_exclude_the_dense_convolution():
    """torch's convolution of these sizes depends on the number of threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1000, 7, 7, generator=generator)
    weight = torch.randn(300, 1000, 1, 1, generator=generator)
    mask = torch.ones(1, 7, 7, dtype=torch.bool)
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out = effops.perforated_conv2d(*leaves, mask)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
