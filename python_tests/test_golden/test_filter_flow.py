"""Golden values of filter_flow: shifts, convolutions, interpolation, padding by F.pad, numbers by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from localfilter_inputs import assert_same_gradients, inside, one_hot, shifted, unfolded
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients

NORMALIZE = pytest.mark.parametrize("normalize", ["softmax", "none", "sum"])
PADDING_MODE = pytest.mark.parametrize("padding_mode", ["zeros", "replicate", "reflect", "renormalize"])
# Kernel, stride, upsample, dilation, groups.
GEOMETRIES = [
    (3, 1, 1, 1, 1),
    (4, 1, 1, 2, 2),
    (5, 2, 1, 1, 1),
    (3, 3, 1, 2, 4),
    (3, 1, 2, 1, 2),
    (2, 1, 3, 2, 1),
]


def positive(*shape, seed=0):
    return 0.1 + torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sides(height, width, stride=1, upsample=1):
    return -(-height * upsample // stride), -(-width * upsample // stride)


def by_unfolding(image, filters, normalize, padding_mode, stride, upsample, dilation, groups):
    """Oracle: padding by F.pad and windows by F.unfold."""
    kernel = round((filters.shape[1] / groups) ** 0.5)
    mode = padding_mode if padding_mode in ("replicate", "reflect") else "constant"
    windows, counted = unfolded(image, kernel, dilation, mode), inside(image, kernel, dilation)
    steps = (Ellipsis, slice(None, None, stride), slice(None, None, stride))
    windows, counted = (
        taps[steps].repeat_interleave(upsample, -1).repeat_interleave(upsample, -2)
        for taps in (windows, counted)
    )
    weights = filters.unflatten(1, (groups, kernel**2))
    weights = weights.exp() if normalize == "softmax" else weights
    if padding_mode == "renormalize":
        weights = weights * counted
    if normalize != "none" or padding_mode == "renormalize":
        weights = weights / weights.sum(2, keepdim=True)
    out = (windows.unflatten(1, (groups, -1)) * weights.unsqueeze(2)).sum(3).flatten(1, 2)
    steps = (torch.arange(kernel) - kernel // 2) * dilation
    dy, dx = (d.flatten()[:, None, None] for d in torch.meshgrid(steps, steps, indexing="ij"))
    flow = torch.stack([(weights * dx).sum(2), (weights * dy).sum(2)], 2).flatten(1, 2)
    return out, flow


# ------------------------------------------------------------------------------------ shifts and convolutions


@pytest.mark.parametrize("kernel", [5, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_one_hot_filters_shift(filter_flow, kernel, dilation):
    """With zeros from outside, up to the farthest taps; the flow is the shift."""
    image = double(2, 3, 6, 7)
    reach = range(-(kernel // 2), kernel - kernel // 2)
    for dy, dx in itertools.product(reach, reach):
        weights = one_hot(kernel, dy, dx, height=6, width=7, batch=2)
        expected_flow = torch.tensor([dx, dy]).double()[:, None, None].expand(2, 2, 6, 7) * dilation
        for normalize, filters in (("none", weights), ("sum", 3 * weights), ("softmax", weights.log())):
            out, flow = filter_flow(image, filters, normalize, return_flow=True, dilation=dilation)
            assert_near(out, shifted(image, dy * dilation, dx * dilation))
            assert_near(flow, expected_flow)


@PADDING_MODE
@pytest.mark.parametrize("kernel", [1, 2, 3, 8, 17])
def test_centre_is_identity(filter_flow, kernel, padding_mode):
    image = double(1, 2, 4, 5)
    out, flow = filter_flow(image, one_hot(kernel, 0, 0, height=4, width=5), "none", padding_mode, True)
    assert torch.equal(out, image)
    assert torch.equal(flow, torch.zeros_like(flow))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"),
    [(3, 1, 1, 1), (5, 1, 1, 3), (3, 2, 1, 1), (3, 3, 2, 3), (7, 1, 2, 1)],
)
def test_constant_filters_convolve(filter_flow, kernel, stride, dilation, groups):
    image, weight = double(2, 6, 11, 13), double(groups, 1, kernel, kernel, seed=1)
    padding = kernel // 2 * dilation
    expected = F.conv2d(
        image, weight.repeat_interleave(6 // groups, 0), None, stride, padding, dilation, groups=6
    )
    filters = weight.flatten()[None, :, None, None].expand(2, -1, *expected.shape[2:])
    out = filter_flow(image, filters, "none", stride=stride, dilation=dilation, groups=groups)
    assert_near(out, expected)


def test_one_tap_strides_and_upsamples(filter_flow):
    image = double(2, 3, 5, 7)
    for stride in (2, 3, 9):
        ones = torch.ones(2, 1, *sides(5, 7, stride)).double()
        assert torch.equal(filter_flow(image, ones, "none", stride=stride), image[:, :, ::stride, ::stride])
    for upsample in (2, 3):
        ones = torch.ones(2, 1, *sides(5, 7, 1, upsample)).double()
        expected = F.interpolate(image, scale_factor=upsample, mode="nearest")
        assert torch.equal(filter_flow(image, ones, "none", upsample=upsample), expected)


def test_bilinear_filters_interpolate(filter_flow):
    """The four taps around each displaced pixel are what grid_sample reads; the flow is the displacement."""
    height, width, kernel = 6, 8, 5
    image = double(1, 3, height, width)
    moved = (
        4 * torch.rand(2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 2
    )
    tap, fraction = moved.floor().long() + kernel // 2, moved - moved.floor()
    filters = torch.zeros(1, kernel**2, height, width, dtype=torch.float64)
    for dy, dx in itertools.product((0, 1), (0, 1)):
        weight = (fraction[0] if dx else 1 - fraction[0]) * (fraction[1] if dy else 1 - fraction[1])
        filters.scatter_(1, ((tap[1] + dy) * kernel + tap[0] + dx)[None, None], weight[None, None])

    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([(x + moved[0]) * 2 / (width - 1) - 1, (y + moved[1]) * 2 / (height - 1) - 1], -1)
    out, flow = filter_flow(image, filters, "none", return_flow=True)
    assert_near(out, F.grid_sample(image, grid[None], padding_mode="zeros", align_corners=True))
    assert_near(flow[0], moved)


# ------------------------------------------------------------------------------------ numbers by hand


def test_box_by_hand(filter_flow):
    image = torch.arange(1.0, 10.0).double().view(1, 1, 3, 3)
    out = filter_flow(image, torch.zeros(1, 9, 3, 3).double())
    ninths = torch.tensor([[12, 21, 16], [27, 45, 33], [24, 39, 28]]).double()
    assert_near(out[0, 0], ninths / 9)


@PADDING_MODE
def test_constant_images_at_borders(filter_flow, padding_mode):
    """Zeros darken the borders: 36 of 121 taps lie inside at a corner. The other ways keep the constant."""
    filters = double(1, 121, 15, 15) if padding_mode != "zeros" else torch.zeros(1, 121, 15, 15).double()
    out = filter_flow(torch.ones(1, 1, 15, 15).double(), filters, "softmax", padding_mode)[0, 0]
    if padding_mode != "zeros":
        assert_near(out, torch.ones_like(out))
        return
    counts = torch.tensor([6, 7, 8, 9, 10, *[11] * 5, 10, 9, 8, 7, 6]).double()
    assert_near(out, counts[:, None] * counts / 121)
    assert out[0, 0].item() == pytest.approx(0.297521, abs=1e-6)


@pytest.mark.parametrize(
    ("padding_mode", "size", "expected"),
    [
        ("reflect", 1, [0] * 9),
        ("reflect", 2, [0, 1, 0, 1, 0, 1, 0, 1, 0]),
        ("reflect", 3, [0, 1, 2, 1, 0, 1, 2, 1, 0]),
        ("reflect", 4, [2, 3, 2, 1, 0, 1, 2, 3, 2]),
        ("replicate", 3, [0, 0, 0, 0, 0, 1, 2, 2, 2]),
    ],
)
def test_padding_of_small_images(filter_flow, padding_mode, size, expected):
    """Which pixel each of the taps at -4 .. 4 reads for pixel 0, along either axis."""
    image = torch.arange(1.0, size + 1).double().view(1, 1, 1, size)
    for step, want in zip(range(-4, 5), expected, strict=True):
        row = filter_flow(image, one_hot(9, 0, step, height=1, width=size), "none", padding_mode)
        column = filter_flow(image.mT, one_hot(9, step, 0, height=size, width=1), "none", padding_mode)
        assert row[0, 0, 0, 0].item() == column[0, 0, 0, 0].item() == want + 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("filter_dtype", FLOATS)
def test_dtypes_by_hand(filter_flow, dtype, filter_dtype):
    image = torch.arange(1.0, 10.0).view(1, 1, 3, 3).to(dtype)
    filters = (
        torch.tensor([0, 0, 0.5, 0, -2, 0, 0, 1, 0]).view(1, 9, 1, 1).expand(1, 9, 3, 3).to(filter_dtype)
    )
    wrong_double = (dtype == torch.float64) != (filter_dtype == torch.float64)
    if wrong_double or {dtype, filter_dtype} == {torch.float16, torch.bfloat16}:
        with pytest.raises(TypeError, match="^filter_flow: expected filters of dtype"):
            filter_flow(image, filters, "none")
        return
    out, flow = filter_flow(image, filters, "none", return_flow=True)
    assert out.dtype == dtype
    assert flow.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out[0, 0, 1].tolist() == [0, -0.5, -3]  # 7 - 2 * 4 + 2 / 2, 8 - 2 * 5 + 3 / 2, 9 - 2 * 6
    assert flow[0, :, 1, 1].tolist() == [0.5, 0.5]


def test_half_results_are_rounded_once(filter_flow):
    """2048 + 1 + 1, which a sum in float16 would leave at 2048."""
    image = torch.tensor([1.0, 2048, 1]).half().view(1, 1, 1, 3)
    out = filter_flow(image, torch.ones(1, 9, 1, 3).half(), "none")
    assert out[0, 0, 0, 1].item() == 2050


@pytest.mark.parametrize("padding_mode", ["zeros", "renormalize"])
def test_weights_without_a_sum(filter_flow, padding_mode):
    """1 / 0 and -1 / 0 at the pixels 0 and 1, 0 / 0 at pixel 2."""
    filters = one_hot(3, 0, 0, height=1, width=3)
    filters[:, 5] = -1  # the tap at (0, 1)
    filters[..., 2] = 0
    image = torch.tensor([1.0, 0, 0]).double().view(1, 1, 1, 3)
    out = filter_flow(image, filters, "sum", padding_mode)
    assert not bool(out.isfinite().any())  # Inf or NaN, by whether the weights or their mixture is divided


@pytest.mark.parametrize("channels", [0, 1, 5])
@pytest.mark.parametrize("normalize", ["none", "sum"])
def test_taps_left_out_have_no_gradient(filter_flow, normalize, channels):
    """Not even where the weights that count are not numbers."""
    image = torch.ones(1, channels, 4, 6).double()
    filters = torch.ones(1, 4, 4, 6).double()
    filters[0, 3, 0, 2] = torch.nan
    filters.requires_grad_()
    out, flow = filter_flow(image, filters, normalize, "renormalize", True)
    (out.sum() + flow.sum()).backward()
    assert filters.grad[0, :2, 0].eq(0).all()  # of the row above the image
    assert filters.grad[0, 2:, 0, 2].isnan().all()


# ------------------------------------------------------------------------------------ formulations


@NORMALIZE
@PADDING_MODE
@pytest.mark.parametrize(("kernel", "stride", "upsample", "dilation", "groups"), GEOMETRIES, ids=str)
def test_agrees_with_padding_and_unfolding(
    filter_flow, kernel, stride, upsample, dilation, groups, padding_mode, normalize
):
    image = double(2, 4, 7, 8).requires_grad_()
    shape = (2, groups * kernel**2, *sides(7, 8, stride, upsample))
    filters = (
        positive(*shape, seed=1) if normalize != "softmax" else double(*shape, seed=1)
    ).requires_grad_()
    settings = {"stride": stride, "upsample": upsample, "dilation": dilation, "groups": groups}
    found = filter_flow(image, filters, normalize, padding_mode, True, **settings)
    alone = filter_flow(image, filters, normalize, padding_mode, **settings)
    expected = by_unfolding(image, filters, normalize, padding_mode, **settings)
    for actual, wanted in zip((*found, alone), (*expected, expected[0]), strict=True):
        assert_near(actual, wanted)
    assert_same_gradients(found, expected, [image, filters])
    assert_same_gradients([alone], expected[:1], [image, filters])
    for result in (0, 1):
        assert_same_gradients([found[result]], [expected[result]], [image, filters][result:])


@PADDING_MODE
def test_renormalized_weights_need_no_normalization(filter_flow, padding_mode):
    """Only there "none" and "sum" agree, whatever the scale of the weights."""
    image, filters = double(1, 2, 5, 6), positive(1, 25, 5, 6, seed=1)
    found = [filter_flow(image, scale * filters, "none", padding_mode) for scale in (1, 8)]
    by_sum = filter_flow(image, filters, "sum", padding_mode)
    is_same = padding_mode == "renormalize"
    assert torch.allclose(found[0], by_sum) == is_same
    assert torch.allclose(found[0], found[1]) == is_same


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate", "reflect"])
def test_gradients_are_adjoint(filter_flow, padding_mode):
    """The output is linear in the image and in the filters: <out, G> = <I, dI> = <T, dT>."""
    image, filters = double(2, 3, 6, 7).requires_grad_(), double(2, 49, 6, 7, seed=1).requires_grad_()
    out = filter_flow(image, filters, "none", padding_mode)
    grad_output = double(*out.shape, seed=2)
    expected = (out * grad_output).sum()
    for leaf, gradient in zip((image, filters), gradients(out, (image, filters), grad_output), strict=True):
        assert_near((leaf * gradient).sum(), expected)


@pytest.mark.parametrize("padding_mode", ["replicate", "reflect", "renormalize"])
def test_softmax_filters_keep_the_range(filter_flow, padding_mode):
    """A mean of the window lies between its least and its greatest pixel."""
    image = double(1, 1, 9, 9)
    out = filter_flow(image, 3 * double(1, 9, 9, 9, seed=1), "softmax", padding_mode)
    greatest = F.max_pool2d(image, 3, 1, 1)
    least = -F.max_pool2d(-image, 3, 1, 1)
    assert bool(((least < out) & (out < greatest)).all())


def test_softmax_of_large_logits(filter_flow):
    image, filters = double(1, 2, 5, 6), double(1, 9, 5, 6, seed=1)
    assert_near(filter_flow(image, filters + 2000, "softmax"), filter_flow(image, filters, "softmax"))


# ------------------------------------------------------------------------------------ NaN and Inf


@pytest.mark.parametrize(
    ("normalize", "padding_mode"),
    [("none", "zeros"), ("none", "renormalize"), ("sum", "renormalize"), ("softmax", "renormalize")],
)
@pytest.mark.parametrize("number", [NAN, INF])
def test_weights_of_the_padding_are_not_multiplied(filter_flow, normalize, padding_mode, number):
    image = double(1, 2, 5, 4).requires_grad_()
    clean = positive(1, 25, 5, 4, seed=1)
    is_outside = inside(image, 5)[:, 0] == 0
    found = []
    for filters in (clean, torch.where(is_outside, number, clean)):
        filters.requires_grad_()
        out = filter_flow(image, filters, normalize, padding_mode)
        found.append((out, *gradients(out, (image, filters), double(*out.shape, seed=2))))
    for actual, wanted in zip(*reversed(found), strict=True):
        assert_near(actual, wanted)
    assert torch.equal(found[1][2][is_outside], torch.zeros_like(clean[is_outside]))


@pytest.mark.parametrize("padding_mode", ["zeros", "renormalize", "replicate"])
def test_pixels_reach_the_windows_that_read_them(filter_flow, padding_mode):
    """A NaN pixel reaches its window, even with weights of 0, and nothing else."""
    image = torch.zeros(1, 1, 6, 6).double()
    image[..., 1, 4] = NAN
    out = filter_flow(image, one_hot(3, 0, 0, height=6, width=6), "none", padding_mode)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:3, 3:] = True
    assert torch.equal(out[0, 0].isnan(), expected)


# ------------------------------------------------------------------------------------ multigrid


def test_multigrid_composition(filter_flow, expected_flow):
    """(2, -1) at an eighth of the size and then (3, 2) make (19, -6) pixels."""
    size, scale = 64, 8
    frame = double(1, 3, size, size)
    coarse_filters = one_hot(11, -1, 2, height=size // scale, width=size // scale).log()
    fine_filters = one_hot(11, 2, 3, height=size, width=size).log()
    coarse = scale * expected_flow(coarse_filters).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    grid = torch.stack([x + coarse[0, 0], y + coarse[0, 1]], -1) * 2 / (size - 1) - 1
    warped = F.grid_sample(frame, grid[None], align_corners=True)
    out, fine = filter_flow(warped, fine_filters, return_flow=True)
    total = fine + coarse  # the coarse flow is the same everywhere
    assert_near(total, torch.tensor([19.0, -6.0]).double()[None, :, None, None].expand(1, 2, size, size))
    interior = (Ellipsis, slice(8, -8), slice(8, -24))
    torch.testing.assert_close(out[interior], shifted(frame, -6, 19)[interior], rtol=0, atol=1e-9)


def test_charbonnier_of_identical_frames(filter_flow):
    """Frames reconstructed exactly, with the centre, leave the loss at its floor of 0.001."""
    frame = double(1, 3, 16, 16)
    out = filter_flow(frame, one_hot(11, 0, 0, height=16, width=16).log())
    assert ((out - frame) ** 2 + 0.001**2).sqrt().mean().item() == pytest.approx(0.001, rel=1e-9)


# ------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("channels", [1, 4])
def test_memory_format(filter_flow, channels):
    """Channels_last for an image that is channels_last and nothing else; a single channel is both."""
    format_of_result = torch.channels_last if channels > 1 else torch.contiguous_format
    image, filters = double(2, channels, 4, 5), double(2, 9, 4, 5, seed=1)
    contiguous = filter_flow(image, filters.contiguous(memory_format=torch.channels_last), return_flow=True)
    assert all(out.is_contiguous() for out in contiguous)
    image = image.contiguous(memory_format=torch.channels_last)
    last = filter_flow(image, filters, return_flow=True)
    for out, wanted in zip(last, contiguous, strict=True):
        assert out.is_contiguous(memory_format=format_of_result)
        assert_near(out, wanted)


@NORMALIZE
@PADDING_MODE
@pytest.mark.parametrize("empty", ["N", "C", "H", "W"])
def test_empty(filter_flow, empty, padding_mode, normalize):
    n, c, h, w = (0 if name == empty else 2 for name in "NCHW")
    image = torch.ones(n, c, h, w, requires_grad=True)
    filters = torch.ones(n, 18, 2 * h, 2 * w, requires_grad=True)
    out, flow = filter_flow(image, filters, normalize, padding_mode, True, upsample=2, groups=2)
    assert out.shape == (n, c, 2 * h, 2 * w)
    assert flow.shape == (n, 4, 2 * h, 2 * w)
    grads = torch.autograd.grad([out.sum(), flow.sum()], (image, filters))
    assert [grad.shape for grad in grads] == [image.shape, filters.shape]
    alone = filter_flow(image, filters, normalize, padding_mode, upsample=2, groups=2)
    of_output = gradients(alone, (image, filters))
    assert [grad.shape for grad in of_output] == [image.shape, filters.shape]
    if empty == "C":
        assert bool(flow.isfinite().all())
        assert not of_output[1].any()


@pytest.mark.parametrize(
    "change",
    [
        {"image": torch.zeros(4, 6, 6)},
        {"filters": torch.zeros(2, 18, 6)},
        {"filters": torch.zeros(1, 18, 6, 6)},
        {"filters": torch.zeros(2, 18, 6, 5)},
        {"filters": torch.zeros(2, 16, 6, 6)},  # 2 * 8 taps
        {"filters": torch.zeros(2, 19, 6, 6)},
        {"filters": torch.zeros(2, 0, 6, 6)},
        {"groups": 0},
        {"groups": 3},
        {"image": torch.zeros(2, 3, 6, 6)},  # 2 groups of 3 channels
        {"stride": 0},
        {"stride": 2},  # filters of another size
        {"upsample": 0},
        {"upsample": 2},
        {"stride": 2, "upsample": 2},
        {"dilation": 0},
        {"normalize": "mean"},
        {"padding_mode": "circular"},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(filter_flow, change):
    arguments = {"image": torch.zeros(2, 4, 6, 6), "filters": torch.zeros(2, 18, 6, 6), "groups": 2}
    with pytest.raises(ValueError, match="^filter_flow: expected"):
        filter_flow(**(arguments | change))
