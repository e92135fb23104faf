"""Golden values of ms_deform_attn and its layer: hand-computed numbers and independent oracles."""

import importlib
import itertools

import pytest
import torch
from sampling_inputs import INF, NAN, double, sample_one_map, sample_with_grid_sample, uniform

from effops.nn import MultiScaleDeformableAttention


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
