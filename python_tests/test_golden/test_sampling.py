"""Golden values of the sampling ops: hand-computed numbers and independent oracles.

Every test runs on the definition (`effops.reference`) and on the native op (`effops.ops`).
"""

import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import effops.reference
from effops.nn import MultiScaleDeformableAttention

NAN, INF = math.nan, math.inf


@pytest.fixture(params=["reference", "op"])
def implementation(request):
    """Looks an op up by name, in the reference or among the native ops."""
    module = effops.reference if request.param == "reference" else importlib.import_module("effops.ops")

    def lookup(name):
        if not hasattr(module, name):
            pytest.skip(f"{module.__name__}.{name} does not exist yet")
        return getattr(module, name)

    return lookup


@pytest.fixture
def ms_deform_attn(implementation):
    return implementation("ms_deform_attn")


@pytest.fixture
def point_sample(implementation):
    return implementation("point_sample")


@pytest.fixture
def roi_align(implementation):
    return implementation("roi_align")


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, low=0.0, high=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=generator)


def ramp(height, width):
    """f(y, x) = 2x - 3y + 1, [H, W]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (2 * x - 3 * y + 1).double()


def sample_with_grid_sample(feature, xy):
    """Oracle: feature [C, H, W] at normalised xy [N, 2] -> [N, C]."""
    grid = 2 * xy[None, None] - 1
    return F.grid_sample(feature[None], grid, padding_mode="zeros", align_corners=False)[0, :, 0].T


# ---- ms_deform_attn ------------------------------------------------------------------------------


def sample_one_map(ms_deform_attn, feature, xy):
    """One head, one level, one point per query, weight 1: feature [H, W, D] at xy [Q, 2] -> [Q, D]."""
    height, width, channels = feature.shape
    value = feature.reshape(1, height * width, 1, channels)
    weights = torch.ones(1, len(xy), 1, 1, 1, dtype=feature.dtype)
    return ms_deform_attn(value, [(height, width)], None, xy.reshape(1, -1, 1, 1, 1, 2), weights)[0]


def test_pixel_centres_are_exact(ms_deform_attn):
    feature = double(4, 8, 3)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    xy = torch.stack([(x + 0.5) / 8, (y + 0.5) / 4], dim=-1).reshape(-1, 2).double()
    assert torch.equal(sample_one_map(ms_deform_attn, feature, xy), feature.reshape(-1, 3))


@pytest.mark.parametrize(
    ("x", "y", "weight", "pixel"),
    [
        (-0.5, 0.0, 0.5, (0, 0)),  # left edge of the map
        (0.0, -0.5, 0.5, (0, 0)),
        (-0.5, -0.5, 0.25, (0, 0)),  # its corner
        (7.5, 3.0, 0.5, (3, 7)),
        (7.5, 3.5, 0.25, (3, 7)),
        (-0.75, 2.0, 0.25, (2, 0)),
        (7.75, 3.75, 0.0625, (3, 7)),
        (-1.0, 2.0, 0.0, (2, 0)),  # exactly one pixel out: inactive
        (8.0, 2.0, 0.0, (2, 7)),
        (3.0, -1.0, 0.0, (0, 3)),
        (3.0, 4.0, 0.0, (3, 3)),
        (2.25, 1.0, 0.75, (1, 2)),
    ],
)
def test_weight_of_a_pixel(ms_deform_attn, x, y, weight, pixel):
    feature = torch.zeros(4, 8, 1, dtype=torch.float64)
    feature[pixel] = 1.0
    xy = torch.tensor([[(x + 0.5) / 8, (y + 0.5) / 4]], dtype=torch.float64)
    assert sample_one_map(ms_deform_attn, feature, xy).item() == weight


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (-1.0, 2.0),
        (8.0, 2.0),
        (3.0, -1.0),
        (3.0, 4.0),
        (1e30, 1.0),
        (NAN, 1.0),
        (1.0, NAN),
        (INF, 1.0),
        (1.0, -INF),
    ],
)
def test_inactive_point_has_no_gradient(ms_deform_attn, x, y):
    value = torch.full((1, 32, 1, 2), NAN, dtype=torch.float64, requires_grad=True)
    xy = torch.tensor([(x + 0.5) / 8, (y + 0.5) / 4], dtype=torch.float64)
    locations = xy.reshape(1, 1, 1, 1, 1, 2).requires_grad_()
    weights = torch.full((1, 1, 1, 1, 1), INF, dtype=torch.float64, requires_grad=True)
    out = ms_deform_attn(value, [(4, 8)], None, locations, weights)
    out.backward(torch.full_like(out, NAN))
    assert torch.equal(out, torch.zeros_like(out))
    for tensor in (value, locations, weights):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_infinite_pixel_beside_a_border_corner(ms_deform_attn):
    """A corner outside the map reads 0; it must not turn the infinite pixel beside it into NaN."""
    feature = torch.full((1, 1, 1), INF, dtype=torch.float64)
    for x in (0.0, -0.5, 0.25):
        xy = torch.tensor([[x + 0.5, 0.5]], dtype=torch.float64)
        assert sample_one_map(ms_deform_attn, feature, xy).item() == INF


def test_gradients_by_hand(ms_deform_attn):
    """A 1 x 2 map (3, 7) at x = 0.25, y = 0, weight 2: out = 2 (0.75 * 3 + 0.25 * 7) = 8.

    The gradient to a coordinate is W or H * weight * slope. Downwards the map ends: the slope from the row,
    where v = 4, to the zeros below it is -4.
    """
    value = torch.tensor([3.0, 7.0], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    locations = torch.tensor([0.75 / 2, 0.5], dtype=torch.float64).reshape(1, 1, 1, 1, 1, 2).requires_grad_()
    weights = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    out = ms_deform_attn(value, [(1, 2)], None, locations, weights)
    out.sum().backward()
    assert out.item() == 8.0
    assert weights.grad.item() == 4.0
    assert value.grad.flatten().tolist() == [1.5, 0.5]
    assert locations.grad.flatten().tolist() == [2 * 2 * (7 - 3), 1 * 2 * -4]


def test_sum_over_levels_and_points(ms_deform_attn):
    """Level 0 is 2 x 2 of 10, level 1 is 1 x 1 of 100, all points at the centre of the map."""
    value = torch.tensor([10.0, 10.0, 10.0, 10.0, 100.0]).reshape(1, 5, 1, 1)
    locations = torch.full((1, 1, 1, 2, 2, 2), 0.5)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 2, 2)
    out = ms_deform_attn(value, torch.tensor([[2, 2], [1, 1]]), None, locations, weights)
    assert out.item() == (1 + 2) * 10 + (3 + 4) * 100


@pytest.mark.parametrize("starts", [[0, 6], [4, 0], [1, 1]])
def test_level_starts_are_honoured(ms_deform_attn, starts):
    value = torch.arange(10.0).reshape(1, 10, 1, 1)
    locations = torch.empty(1, 2, 1, 2, 1, 2)
    locations[0, :, 0, 0, 0] = torch.tensor([[2.5 / 3, 1.5 / 2], [0.5 / 3, 0.5 / 2]])  # last, first pixel
    locations[0, :, 0, 1, 0] = torch.tensor([[1.5 / 2, 1.5 / 2], [0.5 / 2, 0.5 / 2]])
    weights = torch.tensor([1.0, 100.0]).reshape(1, 1, 1, 2, 1).expand(1, 2, 1, 2, 1)
    out = ms_deform_attn(value, [(2, 3), (2, 2)], torch.tensor(starts), locations, weights)
    expected = [starts[0] + 5 + 100 * (starts[1] + 3), starts[0] + 100 * starts[1]]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float32))


def random_attention(seed=0, low=-0.3, high=1.3):
    shapes = [(5, 7), (3, 4), (1, 2)]
    value = double(2, 35 + 12 + 2, 3, 4, seed=seed)
    locations = uniform(2, 6, 3, 3, 2, 2, low=low, high=high, seed=seed + 1)
    weights = double(2, 6, 3, 3, 2, seed=seed + 2)
    return value, shapes, locations, weights


def ms_deform_attn_with_grid_sample(value, shapes, locations, weights):
    """Oracle: the sum over levels and points, one image and head at a time."""
    levels = value.split([height * width for height, width in shapes], dim=1)

    def attend(image, head):
        out = 0
        for level, shape in enumerate(shapes):
            feature = levels[level][image, :, head].T.reshape(-1, *shape)
            xy = locations[image, :, head, level]  # [Q, P, 2]
            sampled = sample_with_grid_sample(feature, xy.reshape(-1, 2)).reshape(*xy.shape[:2], -1)
            out = out + (weights[image, :, head, level][..., None] * sampled).sum(1)
        return out

    batch, _, heads, _ = value.shape
    return torch.stack(
        [torch.cat([attend(image, head) for head in range(heads)], dim=1) for image in range(batch)]
    )


def test_ms_deform_attn_agrees_with_grid_sample(ms_deform_attn):
    value, shapes, locations, weights = random_attention()
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    expected = ms_deform_attn_with_grid_sample(value, shapes, locations, weights)
    out = ms_deform_attn(value, shapes, None, locations, weights)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = double(*out.shape, seed=9)
    for got, want in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_ms_deform_attn_gradcheck(ms_deform_attn):
    value, shapes, locations, weights = random_attention(seed=5)
    inputs = tuple(tensor[:1, :49].requires_grad_() for tensor in (value, locations, weights))

    def attend(value, locations, weights):
        return ms_deform_attn(value, shapes, None, locations, weights)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_beside_float_locations(ms_deform_attn, dtype):
    value, shapes, locations, weights = random_attention()
    value, weights, locations = value.to(dtype), weights.to(dtype), locations.float()
    out = ms_deform_attn(value, shapes, None, locations, weights)
    exact = ms_deform_attn(value.double(), shapes, None, locations.double(), weights.double())
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("empty", ["B", "Q", "M", "L", "P", "D"])
def test_ms_deform_attn_empty(ms_deform_attn, empty):
    size = dict.fromkeys("BQMLPD", 2) | {empty: 0}
    b, q, m, levels, p, d = size.values()
    inputs = (
        torch.ones(b, 6 * levels, m, d, requires_grad=True),
        torch.full((b, q, m, levels, p, 2), 0.4, requires_grad=True),
        torch.ones(b, q, m, levels, p, requires_grad=True),
    )
    value, locations, weights = inputs
    out = ms_deform_attn(value, [(2, 3)] * levels, None, locations, weights)
    assert torch.equal(out, torch.zeros(b, q, m * d))
    out.sum().backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize(
    ("shapes", "starts"),
    [
        ([(2, 3), (0, 2)], [0, 6]),
        ([(2, 3), (-1, -2)], [0, 6]),
        ([(2, 3), (2, 2)], [0, -1]),
        ([(2, 3), (2, 2)], [0, 7]),
        ([(2, 3), (2, 3)], None),
        ([(2, 3), (1 << 40, 1 << 40)], [0, 0]),
    ],
)
def test_level_outside_the_rows(ms_deform_attn, shapes, starts):
    starts = None if starts is None else torch.tensor(starts)
    with pytest.raises(ValueError, match="ms_deform_attn"):
        ms_deform_attn(
            torch.ones(1, 10, 1, 1),
            torch.tensor(shapes),
            starts,
            torch.zeros(1, 1, 1, 2, 1, 2),
            torch.zeros(1, 1, 1, 2, 1),
        )


# ---- point_sample --------------------------------------------------------------------------------


def random_points(count=24):
    pyramid = [double(2, 3, 5, 7), double(2, 3, 3, 4, seed=1), double(2, 3, 1, 1, seed=2)]
    generator = torch.Generator().manual_seed(3)
    batch = torch.randint(2, (count,), generator=generator)
    level = torch.randint(3, (count,), generator=generator)
    return pyramid, batch, level, uniform(count, 2, low=-0.4, high=1.4, seed=4)


def test_point_sample_agrees_with_grid_sample(point_sample):
    pyramid, batch, level, xy = random_points()
    inputs = [tensor.requires_grad_() for tensor in (*pyramid, xy)]
    out = point_sample(pyramid, batch, level, xy)
    expected = torch.cat(
        [
            sample_with_grid_sample(pyramid[lv][image], point[None])
            for image, lv, point in zip(batch.tolist(), level.tolist(), xy, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = double(*out.shape, seed=9)
    for got, want in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_point_sample_agrees_with_ms_deform_attn(implementation, point_sample):
    """A point is a query with one head, one level and weight 1."""
    pyramid, batch, level, xy = random_points()
    out = point_sample(pyramid, batch, level, xy)
    for row, image, lv, point in zip(out, batch.tolist(), level.tolist(), xy, strict=True):
        feature = pyramid[lv][image].permute(1, 2, 0)
        expected = sample_one_map(implementation("ms_deform_attn"), feature, point[None])[0]
        torch.testing.assert_close(row, expected, rtol=1e-13, atol=1e-13)


def test_point_sample_on_a_ramp(point_sample):
    """2x - 3y + 1 at pixel (2.25, 1.5) is 1, and the gradient to (x, y) is (2 W, -3 H)."""
    xy = torch.tensor([[2.75 / 8, 2.0 / 4]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int64)
    out = point_sample([ramp(4, 8)[None, None]], zero, zero, xy)
    out.backward()
    assert out.item() == 1.0
    assert xy.grad.tolist() == [[2.0 * 8, -3.0 * 4]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_point_sample_inactive(point_sample, bad):
    feature = torch.full((1, 2, 3, 3), NAN, dtype=torch.float64, requires_grad=True)
    xy = torch.tensor([[bad, 0.5], [0.5, bad]], dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(2, dtype=torch.int64)
    out = point_sample([feature], ids, ids, xy)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(feature.grad, torch.zeros_like(feature))
    assert torch.equal(xy.grad, torch.zeros_like(xy))


@pytest.mark.parametrize(("batch", "level"), [(2, 0), (-1, 0), (0, 3), (0, -1)])
def test_point_sample_id_out_of_range(point_sample, batch, level):
    pyramid = random_points()[0]
    with pytest.raises(ValueError, match="point_sample"):
        point_sample(pyramid, torch.tensor([batch]), torch.tensor([level]), torch.zeros(1, 2).double())


# ---- roi_align -----------------------------------------------------------------------------------


def align_box(roi_align, feature, box, output_size, sampling_ratio=0, aligned=True, stride=1):
    """One box on one map: feature [H, W] -> [h, w]."""
    rois = torch.tensor([[0, *box]], dtype=feature.dtype)
    level = torch.zeros(1, dtype=torch.int64)
    out = roi_align(
        [feature[None, None]], rois, level, output_size, sampling_ratio, aligned, strides=[stride]
    )
    return out[0, 0]


def roi_align_by_loops(feature, box, output_size, sampling_ratio, aligned, stride):
    """Oracle: scalar loops over bins and samples, written from torchvision's documentation."""
    size_y, size_x = feature.shape
    x1, y1, x2, y2 = (side / stride - (0.5 if aligned else 0.0) for side in box)
    box_w, box_h = x2 - x1, y2 - y1
    if not aligned:
        box_w, box_h = max(box_w, 1.0), max(box_h, 1.0)
    h, w = output_size
    n_y = sampling_ratio or max(math.ceil(box_h / h), 0)
    n_x = sampling_ratio or max(math.ceil(box_w / w), 0)
    out = torch.zeros(h, w, dtype=torch.float64)
    for i, j, a, b in itertools.product(range(h), range(w), range(n_y), range(n_x)):
        y = y1 + box_h / h * (i + (a + 0.5) / n_y)
        x = x1 + box_w / w * (j + (b + 0.5) / n_x)
        if y < -1 or y > size_y or x < -1 or x > size_x:
            continue
        y, x = min(max(y, 0.0), size_y - 1.0), min(max(x, 0.0), size_x - 1.0)
        y0, x0 = int(y), int(x)
        y1_, x1_ = min(y0 + 1, size_y - 1), min(x0 + 1, size_x - 1)
        top = (1 - (x - x0)) * feature[y0, x0] + (x - x0) * feature[y0, x1_]
        bottom = (1 - (x - x0)) * feature[y1_, x0] + (x - x0) * feature[y1_, x1_]
        out[i, j] += ((1 - (y - y0)) * top + (y - y0) * bottom) / (n_y * n_x)
    return out


def test_roi_align_on_a_ramp(roi_align):
    out = align_box(roi_align, ramp(16, 20), (24, 16, 104, 80), 7, sampling_ratio=2, stride=8)
    assert out.shape == (7, 7)
    assert out[0, 0].item() == pytest.approx(1.214286, abs=1e-6)
    assert out[6, 6].item() == pytest.approx(-2.214286, abs=1e-6)
    assert out[0, 0].item() == pytest.approx(17 / 14, rel=1e-13)


def test_roi_align_on_the_pixel_grid_is_a_slice(roi_align):
    feature = double(16, 20)
    out = align_box(roi_align, feature, (3, 4, 8, 9), 5, sampling_ratio=1)
    assert torch.equal(out, feature[4:9, 3:8])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
@pytest.mark.parametrize("output_size", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize(
    "box",
    [
        (4.0, 6.0, 21.5, 30.25),
        (-9.0, -13.0, 12.0, 11.0),  # across the top left corner
        (15.0, 20.0, 60.0, 90.0),  # across the bottom right corner
        (5.0, 6.0, 5.5, 6.25),  # smaller than a pixel
        (9.0, 9.0, 9.0, 9.0),  # empty
        (20.0, 20.0, 4.0, 8.0),  # inverted
        (200.0, 300.0, 220.0, 310.0),  # outside
    ],
)
def test_roi_align_agrees_with_loops(roi_align, box, output_size, sampling_ratio, aligned):
    feature = double(9, 7)
    out = align_box(roi_align, feature, box, output_size, sampling_ratio, aligned, stride=4)
    expected = roi_align_by_loops(feature, box, output_size, sampling_ratio, aligned, stride=4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("y", "row"), [(-1.0, 0), (-0.5, 0), (3.0, 3), (3.5, 3), (4.0, 3), (-1.0001, None), (4.0001, None)]
)
def test_roi_align_border_rule(roi_align, y, row):
    """A sample up to and including one pixel outside reads the border; a sample beyond reads 0."""
    feature = double(4, 4)
    out = align_box(roi_align, feature, (1.0, y, 2.0, y + 1.0), 1, sampling_ratio=1)
    expected = 0.0 if row is None else feature[row, 1].item()
    assert out.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("side", "samples"), [(0.5, 1), (1.0, 1), (1.25, 2), (7.0, 7), (8.0, 8), (8.5, 8), (30.0, 8)]
)
def test_roi_align_adaptive_count(roi_align, side, samples):
    """On a map of side 3 the adaptive count is min(ceil(bin), 2 * 3 + 2)."""
    feature = double(3, 3)
    box = (-1.0, -2.0, side - 1.0, side - 2.0)
    out = align_box(roi_align, feature, box, 1)
    assert torch.equal(out, align_box(roi_align, feature, box, 1, sampling_ratio=samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize(
    "box",
    [
        (NAN, 0, 3, 3),
        (0, 0, NAN, 3),
        (0, 0, INF, 3),
        (-INF, 0, 3, 3),
        (0, -INF, 3, INF),
        (-3e38, -3e38, 3e38, 3e38),  # the size overflows float32
    ],
)
def test_roi_align_non_finite_box(roi_align, box, sampling_ratio, aligned, dtype):
    feature = torch.full((1, 1, 5, 5), NAN, dtype=dtype, requires_grad=True)
    rois = torch.tensor([[0, *box]], dtype=dtype)
    level = torch.zeros(1, dtype=torch.int64)
    out = roi_align([feature], rois, level, 2, sampling_ratio, aligned, strides=[1])
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(feature.grad, torch.zeros_like(feature))


@pytest.mark.parametrize("scale", [1e3, 1e9, 1e30])
def test_roi_align_absurd_box_ends(roi_align, scale):
    out = align_box(roi_align, torch.ones(4, 5).double(), (-scale, -scale, scale, scale), 3)
    assert ((out >= 0) & (out < 0.1)).all()


def test_roi_align_pyramid(roi_align):
    """Each RoI reads the map of its level, at the stride of that map, from its own image."""
    pyramid = [double(2, 3, 12, 10), double(2, 3, 6, 5, seed=1)]
    rois = torch.tensor([[1, 3, 5, 30, 41], [0, 3, 5, 30, 41], [1, 8, 0, 39, 22]], dtype=torch.float64)
    level = torch.tensor([0, 1, 1])
    out = roi_align(pyramid, rois, level, (3, 2), strides=[4, 8])
    assert out.shape == (3, 3, 3, 2)
    for r, channel in itertools.product(range(3), range(3)):
        feature = pyramid[level[r]][int(rois[r, 0]), channel]
        expected = roi_align_by_loops(feature, rois[r, 1:].tolist(), (3, 2), 0, True, [4, 8][level[r]])
        torch.testing.assert_close(out[r, channel], expected, rtol=1e-12, atol=1e-12)


def test_roi_align_gradients(roi_align):
    """Maps get the transpose of the averaging; a box inside the map passes on all of its gradient."""
    pyramid = [double(2, 2, 6, 5).requires_grad_(), double(2, 2, 3, 3, seed=1).requires_grad_()]
    rois = torch.tensor([[1, 8, 8, 17, 20], [0, -5, -3, 9, 30]], dtype=torch.float64, requires_grad=True)
    level = torch.tensor([0, 1])

    def align(*maps):
        return roi_align(list(maps), rois, level, 2, strides=[4, 8])

    assert torch.autograd.gradcheck(align, tuple(pyramid))
    out = align(*pyramid)
    grads = torch.autograd.grad(out[0].sum(), pyramid)
    assert grads[0][1].sum().item() == pytest.approx(out[0].numel(), rel=1e-13)
    assert grads[0][0].abs().sum() == 0
    assert grads[1].abs().sum() == 0
    assert torch.autograd.grad(align(*pyramid).sum(), (*pyramid, rois), allow_unused=True)[2] is None


@pytest.mark.parametrize("empty", ["R", "C", "RB"])
def test_roi_align_empty(roi_align, empty):
    r, c, b = (0 if name in empty else 2 for name in "RCB")
    feature = torch.ones(b, c, 4, 4, requires_grad=True)
    rois = torch.tensor([0.0, 0.0, 0.0, 3.0, 3.0]).expand(r, 5)
    out = roi_align([feature], rois, torch.zeros(r, dtype=torch.int64), (2, 3), strides=[1])
    assert out.shape == (r, c, 2, 3)
    out.sum().backward()
    assert torch.equal(feature.grad, torch.zeros_like(feature))


@pytest.mark.parametrize(("batch", "level"), [(2.0, 0), (-1.0, 0), (NAN, 0), (INF, 0), (0.0, 2), (0.0, -1)])
def test_roi_align_id_out_of_range(roi_align, batch, level):
    pyramid = [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)]
    with pytest.raises(ValueError, match="roi_align"):
        roi_align(pyramid, torch.tensor([[batch, 0, 0, 3, 3]]), torch.tensor([level]), 2, strides=[1, 2])


@pytest.mark.parametrize(
    "change",
    [
        {"output_size": 0},
        {"output_size": (2, -1)},
        {"strides": [1]},
        {"strides": [1, 0]},
        {"strides": [1, NAN]},
        {"pyramid": [], "strides": []},
        {"rois": torch.zeros(1, 4)},
        {"level": torch.zeros(2, dtype=torch.int64)},
    ],
)
def test_roi_align_bad_arguments(roi_align, change):
    arguments = {
        "pyramid": [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)],
        "rois": torch.zeros(1, 5),
        "level": torch.zeros(1, dtype=torch.int64),
        "output_size": 2,
        "strides": [1, 2],
    }
    with pytest.raises(ValueError, match="roi_align"):
        roi_align(**(arguments | change))


# ---- the attention layer -------------------------------------------------------------------------


def initial_locations(monkeypatch, module, reference, shapes):
    """The sampling locations that the layer passes to the op, for a random query."""
    passed = {}

    def capture(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
        passed["locations"] = sampling_locations
        return value.new_zeros(len(value), sampling_locations.shape[1], value.shape[2] * value.shape[3])

    monkeypatch.setattr(importlib.import_module("effops.nn.ms_deform_attn"), "ms_deform_attn", capture)
    rows = sum(height * width for height, width in shapes)
    batch, queries = reference.shape[:2]
    query = torch.randn(batch, queries, module.embed_dim, dtype=reference.dtype)
    value = torch.randn(batch, rows, module.embed_dim, dtype=reference.dtype)
    module(query, reference, value, shapes)
    return passed["locations"]


def test_heads_start_on_edges_and_corners_of_the_box(monkeypatch):
    """Box centre (0.5, 0.25), size (0.5, 0.25): with one point the 8 heads are exactly on its outline."""
    module = MultiScaleDeformableAttention(16, num_heads=8, num_levels=2, num_points=1)
    reference = torch.tensor([0.5, 0.25, 0.5, 0.25]).expand(1, 1, 2, 4)
    locations = initial_locations(monkeypatch, module, reference, [(4, 4), (2, 2)])
    assert locations.shape == (1, 1, 8, 2, 1, 2)
    outline = [
        [0.75, 0.25],
        [0.75, 0.375],
        [0.5, 0.375],
        [0.25, 0.375],
        [0.25, 0.25],
        [0.25, 0.125],
        [0.5, 0.125],
        [0.75, 0.125],
    ]
    for level in range(2):
        assert locations[0, 0, :, level, 0].tolist() == outline


def test_points_start_in_steps_from_the_reference_point(monkeypatch):
    """Head 1 of 4 points along +y, by k pixels of the map at point k; head 0 along +x."""
    module = MultiScaleDeformableAttention(16, num_heads=4, num_levels=2, num_points=3)
    reference = torch.tensor([0.5, 0.25]).expand(1, 1, 2, 2)
    shapes = [(8, 4), (4, 2)]
    locations = initial_locations(monkeypatch, module, reference, shapes)
    for level, (height, width) in enumerate(shapes):
        for k in (1, 2, 3):
            assert locations[0, 0, 0, level, k - 1].tolist() == [0.5 + k / width, 0.25]
            assert locations[0, 0, 1, level, k - 1].tolist() == [0.5, 0.25 + k / height]


@pytest.mark.parametrize("size", [2, 4])
def test_location_formulas(monkeypatch, size):
    module = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, num_points=3).double()
    torch.nn.init.normal_(module.sampling_offsets.bias)
    offsets = module.sampling_offsets.bias.detach().reshape(2, 2, 3, 2)
    reference = uniform(2, 5, 2, size)
    shapes = [(8, 4), (3, 7)]
    locations = initial_locations(monkeypatch, module, reference, shapes)
    for b, q, m, level, k in itertools.product(range(2), range(5), range(2), range(2), range(3)):
        height, width = shapes[level]
        frame = reference[b, q, level]
        unit = frame[2:] / 2 / 3 if size == 4 else 1 / torch.tensor([width, height]).double()
        expected = frame[:2] + offsets[m, level, k] * unit
        torch.testing.assert_close(locations[b, q, m, level, k], expected, rtol=1e-14, atol=1e-14)
