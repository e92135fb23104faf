"""Golden values of point_sample: hand-computed numbers and independent oracles."""

import pytest
import torch
from sampling_inputs import INF, NAN, double, ramp, sample_one_map, sample_with_grid_sample, uniform


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
