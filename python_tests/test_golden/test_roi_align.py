"""Golden values of roi_align: hand-computed numbers and independent oracles."""

import itertools
import math

import pytest
import torch
from sampling_inputs import INF, NAN, double, ramp


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 9, 12, 20])
def test_roi_align_reads_no_channel_after_the_last(roi_align, channels, dtype):
    """Channels that fill no whole register, at the end of the memory: AddressSanitizer sees more."""
    feature = torch.arange(4.0 * channels).to(dtype).reshape(1, 2, 2, channels).permute(0, 3, 1, 2)
    rois, level = torch.tensor([[0, 1, 1, 2, 2]], dtype=dtype), torch.zeros(1, dtype=torch.int64)
    result = roi_align([feature], rois, level, 1, sampling_ratio=1, strides=[1])
    assert result.flatten().equal(feature[0, :, 1, 1])
