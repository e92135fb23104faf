"""effops.compat: functions of other libraries against their definitions in plain PyTorch."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES

import effops
from effops import compat
from effops.compat import carafe, convex_upsample, involution

DEVICE = pytest.mark.parametrize("device", DEVICES)
# Of the maps, and of the filters.
DTYPES = pytest.mark.parametrize(
    ("dtype", "filter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
EACH = pytest.mark.parametrize("function", [carafe, convex_upsample, involution], ids=lambda f: f.__name__)


def random(*shape, device="cpu", dtype=torch.float32, seed=0):
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype).requires_grad_()


def assert_agrees(function, definition, maps, filters):
    """With the definition in float64; results and gradients are rounded once to their dtypes."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (maps, filters)]
    out, expected = function(maps, filters), definition(*wide)
    assert (out.dtype, out.shape) == (maps.dtype, expected.shape)
    grad_output = random(*out.shape, device=out.device, dtype=out.dtype, seed=9).detach()
    gradients = torch.autograd.grad(out, (maps, filters), grad_output)
    wanted = torch.autograd.grad(expected, wide, grad_output.double())
    assert_near(out, expected)
    # Backward knows the output only as it was rounded.
    share = 2**-8 if maps.dtype == torch.bfloat16 else 0
    for got, want in zip(gradients, wanted, strict=True):
        assert_near(got, want, share)
    assert [gradient.dtype for gradient in gradients] == [maps.dtype, filters.dtype]


def assert_near(actual, expected, share=0):
    """`share`: of the largest value, that each may be off."""
    rtol, atol = {
        torch.float64: (1e-12, 1e-12),
        torch.float32: (1e-5, 1e-5),
        torch.bfloat16: (2**-8, 1e-5),
    }[actual.dtype]
    atol += share * float(expected.detach().abs().amax()) if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------ carafe


def plain_carafe(features, masks, kernel, groups, factor):
    """The windows around each pixel, repeated for the output pixels that it becomes."""
    batch, channels, height, width = features.shape
    windows = F.unfold(features, kernel, padding=kernel // 2).view(batch, -1, height, width)
    windows = F.interpolate(windows, scale_factor=factor, mode="nearest")
    windows = windows.unflatten(1, (groups, channels // groups, kernel**2))
    return (windows * masks.unflatten(1, (groups, 1, kernel**2))).sum(3).flatten(1, 2)


@DEVICE
@DTYPES
@pytest.mark.parametrize(("kernel", "groups", "factor"), [(5, 1, 2), (3, 2, 3), (1, 4, 2), (5, 2, 1)])
def test_carafe(device, dtype, filter_dtype, kernel, groups, factor):
    features = random(2, 4, 5, 6, device=device, dtype=dtype)
    masks = random(2, groups * kernel**2, factor * 5, factor * 6, device=device, dtype=filter_dtype, seed=1)
    settings = (kernel, groups, factor)
    assert_agrees(
        lambda x, m: carafe(x, m, *settings), lambda x, m: plain_carafe(x, m, *settings), features, masks
    )


def test_carafe_by_hand():
    """A mask that reads the left neighbour, the same one for both columns that a pixel becomes."""
    features = torch.tensor([[1.0, 2, 3]]).view(1, 1, 1, 3)
    masks = torch.zeros(1, 9, 2, 6)
    masks[:, 3] = 1
    out = carafe(features, masks, kernel_size=3, group_size=1, scale_factor=2)
    assert out.tolist() == [[[[0, 0, 1, 1, 2, 2]] * 2]]


def test_masks_are_normalised_by_filter_flow():
    """As the docstring says."""
    features, logits = random(1, 4, 3, 4), random(1, 18, 6, 8, seed=1)
    masks = logits.unflatten(1, (2, 9)).softmax(2).flatten(1, 2)
    found = effops.filter_flow(features, logits, upsample=2, groups=2)
    torch.testing.assert_close(found, carafe(features, masks, 3, 2, 2))


# ------------------------------------------------------------------------------------ convex_upsample


def plain_upsample_flow(flow, mask, factor, scale):
    """RAFT's: 9 values per pixel, combined by factor * factor sets of weights that sum to 1."""
    batch, channels, height, width = flow.shape
    windows = F.unfold(scale * flow, 3, padding=1).view(batch, channels, 9, 1, 1, height, width)
    weights = mask.view(batch, 1, 9, factor, factor, height, width).softmax(2)
    blocks = (weights * windows).sum(2).permute(0, 1, 4, 2, 5, 3)  # [N, C, H, f, W, f]
    return blocks.reshape(batch, channels, factor * height, factor * width)


@DEVICE
@DTYPES
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("factor", "scale"), [(8, None), (4, None), (2, 1.0), (1, 0.5)])
def test_convex_upsample(device, dtype, filter_dtype, channels, factor, scale):
    """The scale is a power of 2: multiplying by it rounds nothing."""
    flow = random(2, channels, 4, 5, device=device, dtype=dtype)
    mask = random(2, 9 * factor**2, 4, 5, device=device, dtype=filter_dtype, seed=1)
    assert_agrees(
        lambda f, m: convex_upsample(f, m, factor, scale),
        lambda f, m: plain_upsample_flow(f, m, factor, factor if scale is None else scale),
        flow,
        mask,
    )


def test_convex_upsample_uses_a_factor_of_8():
    flow, mask = random(1, 2, 3, 4), random(1, 576, 3, 4, seed=1)
    assert torch.equal(convex_upsample(flow, mask), convex_upsample(flow, mask, 8, 8.0))


def test_convex_upsample_of_constant_flow():
    """Away from the border, where zeros are mixed in, a constant stays one: here 3 times (1, -2)."""
    flow = torch.tensor([1.0, -2]).view(1, 2, 1, 1).expand(1, 2, 5, 6)
    out = convex_upsample(flow, random(1, 81, 5, 6), factor=3)
    interior = out[:, :, 3:-3, 3:-3]
    torch.testing.assert_close(interior, 3 * flow[:, :, :1, :1].expand_as(interior))
    assert bool((out[:, 0] > 0).all())
    assert bool((out[:, 0, 0] < 3).all())


def test_convex_upsample_without_a_mask():
    """Bilinear, with the corners of input and output at the same places."""
    flow = torch.tensor([[0.0, 3], [6, 9]]).view(1, 1, 2, 2)
    out = convex_upsample(flow, None, factor=2)
    assert_near(out, 2 * torch.tensor([[[[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]]]).double())
    assert_near(2 * convex_upsample(flow, None, 2, scale=1), out.double())


# ------------------------------------------------------------------------------------ involution


def plain_involution(x, weight, stride, dilation):
    """Of weights [N, G, K, K, Ho, Wo]."""
    groups, kernel = weight.shape[1:3]
    padding = (kernel - 1) // 2 * dilation
    windows = F.unfold(x, kernel, dilation, padding, stride)
    windows = windows.view(len(x), groups, x.shape[1] // groups, kernel**2, *weight.shape[4:])
    return (windows * weight.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)


@DEVICE
@DTYPES
@pytest.mark.parametrize(
    ("kernel", "groups", "stride", "dilation"), [(7, 1, 1, 1), (3, 2, 2, 1), (3, 4, 1, 2), (5, 2, 3, 2)]
)
def test_involution(device, dtype, filter_dtype, kernel, groups, stride, dilation):
    x = random(2, 4, 8, 9, device=device, dtype=dtype)
    sides = (-(-8 // stride), -(-9 // stride))
    weight = random(2, groups, kernel, kernel, *sides, device=device, dtype=filter_dtype, seed=1)
    assert_agrees(
        lambda x, w: involution(x, w, stride, dilation),
        lambda x, w: plain_involution(x, w, stride, dilation),
        x,
        weight,
    )
    flat = involution(x, weight.flatten(1, 3), stride, dilation, groups=groups)
    assert torch.equal(flat, involution(x, weight, stride, dilation))


def test_involution_by_hand():
    """The right neighbour twice minus the pixel itself, of every second pixel."""
    x = torch.arange(1.0, 6.0).view(1, 1, 1, 5)
    weight = torch.zeros(1, 1, 3, 3, 1, 3)
    weight[:, :, 1] = torch.tensor([0.0, -1, 2]).view(3, 1, 1)
    assert involution(x, weight, 2).flatten().tolist() == [3, 5, -5]
    assert torch.equal(involution(x, weight.flatten(1, 3), 2), involution(x, weight, 2))  # one group


# ------------------------------------------------------------------------------------ forms and errors


@EACH
def test_memory_format(function):
    """That of the maps."""
    maps, filters = random(2, 4, 5, 6).detach(), random(2, 9, 5, 6, seed=1).detach()
    settings = {carafe: (3,), convex_upsample: (1,), involution: ()}[function]
    out = function(maps, filters, *settings)
    assert out.is_contiguous()
    last = function(maps.contiguous(memory_format=torch.channels_last), filters, *settings)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)


@EACH
@pytest.mark.parametrize("empty", ["N", "C", "H", "W"])
def test_empty(function, empty):
    n, c, h, w = (0 if name == empty else 2 for name in "NCHW")
    factor = 1 if function is involution else 2
    shape, settings = {
        carafe: ((n, 18, 2 * h, 2 * w), (3, 2, 2)),
        convex_upsample: ((n, 36, h, w), (2,)),
        involution: ((n, 2, 3, 3, h, w), ()),
    }[function]
    maps, filters = random(n, c, h, w), random(*shape)
    out = function(maps, filters, *settings)
    assert out.shape == (n, c, factor * h, factor * w)
    gradients = torch.autograd.grad(out.sum(), (maps, filters))
    assert [gradient.shape for gradient in gradients] == [maps.shape, filters.shape]


@pytest.mark.compile
@EACH
def test_compiles_with_dynamic_sizes(function):
    settings = {carafe: (3, 1, 2), convex_upsample: (2,), involution: (1, 1)}[function]
    compiled = torch.compile(
        lambda a, b: function(a, b, *settings), fullgraph=True, dynamic=True, backend="eager"
    )
    for height, width in ((4, 5), (6, 7)):
        maps = random(2, 4, height, width)
        shape = {
            carafe: (2, 9, 2 * height, 2 * width),
            convex_upsample: (2, 36, height, width),
            involution: (2, 2, 3, 3, height, width),
        }[function]
        filters = random(*shape, seed=1)
        torch.testing.assert_close(compiled(maps, filters), function(maps, filters, *settings))


MAPS = torch.zeros(2, 4, 5, 6)
CARAFE = {"features": MAPS, "masks": torch.zeros(2, 18, 10, 12)}
CARAFE |= {"kernel_size": 3, "group_size": 2, "scale_factor": 2}
CONVEX = {"flow": MAPS, "up_mask": torch.zeros(2, 36, 5, 6), "factor": 2}
INVOLUTION = {"x": MAPS, "weight": torch.zeros(2, 2, 3, 3, 5, 6)}


@pytest.mark.parametrize(
    ("function", "arguments", "change", "blamed"),
    [
        (carafe, CARAFE, {"features": MAPS[0]}, "features"),
        (carafe, CARAFE, {"masks": torch.zeros(2, 18, 10, 11)}, "masks"),
        (carafe, CARAFE, {"masks": torch.zeros(2, 9, 10, 12)}, "masks"),
        (carafe, CARAFE, {"masks": torch.zeros(18, 10, 12)}, "masks"),
        (carafe, CARAFE, {"kernel_size": 5}, "masks"),
        (carafe, CARAFE, {"kernel_size": 2, "masks": torch.zeros(2, 8, 10, 12)}, "an odd kernel_size"),
        (carafe, CARAFE, {"group_size": 3}, "group_size"),
        (carafe, CARAFE, {"group_size": 0}, "group_size"),
        (carafe, CARAFE, {"scale_factor": 0}, "scale_factor"),
        (carafe, CARAFE, {"scale_factor": 1}, "masks"),
        (convex_upsample, CONVEX, {"flow": MAPS[0]}, "flow"),
        (convex_upsample, CONVEX, {"up_mask": torch.zeros(2, 9, 10, 12)}, "up_mask"),
        (convex_upsample, CONVEX, {"up_mask": torch.zeros(1, 36, 5, 6)}, "up_mask"),
        (convex_upsample, CONVEX, {"factor": 3}, "up_mask"),
        (convex_upsample, CONVEX, {"factor": 0}, "factor"),
        (involution, INVOLUTION, {"x": MAPS[0]}, "x"),
        (involution, INVOLUTION, {"weight": torch.zeros(2, 2, 9, 5, 6)}, "weight"),
        (involution, INVOLUTION, {"weight": torch.zeros(2, 2, 3, 3, 5, 5)}, "weight"),
        (involution, INVOLUTION, {"weight": torch.zeros(2, 2, 3, 1, 5, 6)}, "weight"),
        (involution, INVOLUTION, {"weight": torch.zeros(2, 2, 4, 4, 5, 6)}, "an odd kernel of weight"),
        (involution, INVOLUTION, {"weight": torch.zeros(2, 3, 3, 3, 5, 6)}, "groups"),
        (involution, INVOLUTION, {"weight": torch.zeros(2, 18, 5, 6)}, "weight"),
        (involution, INVOLUTION, {"weight": torch.zeros(2, 9, 5, 5)}, "weight"),
        (involution, INVOLUTION, {"groups": 1}, "weight"),
        (involution, INVOLUTION, {"stride": 2}, "weight"),
        (involution, INVOLUTION, {"stride": 0}, "stride"),
        (involution, INVOLUTION, {"dilation": 0}, "dilation"),
    ],
)
def test_bad_arguments(function, arguments, change, blamed):
    with pytest.raises(ValueError, match=f"^{function.__name__}: expected {blamed}"):
        function(**(arguments | change))


@pytest.mark.parametrize(
    ("function", "arguments", "change", "blamed"),
    [
        (carafe, CARAFE, {"features": [[0]]}, "features"),
        (carafe, CARAFE, {"masks": None}, "masks"),
        (carafe, CARAFE, {"kernel_size": 3.0}, "kernel_size"),
        (convex_upsample, CONVEX, {"factor": 2.0}, "factor"),
        (convex_upsample, CONVEX, {"up_mask": [0]}, "up_mask"),
        (involution, INVOLUTION, {"weight": None}, "weight"),
        (involution, INVOLUTION, {"stride": 1.0}, "stride"),
    ],
)
def test_arguments_of_another_kind(function, arguments, change, blamed):
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected {blamed}"):
        function(**(arguments | change))


@pytest.mark.parametrize(
    ("function", "arguments"), [(carafe, CARAFE), (convex_upsample, CONVEX), (involution, INVOLUTION)]
)
def test_wrong_dtypes(function, arguments):
    first, second, *_ = arguments
    for change in ({second: arguments[second].double()}, {first: MAPS.int()}):
        with pytest.raises(TypeError, match="expected"):
            function(**(arguments | change))


@EACH
def test_docstring(function):
    """All parameters are explained, and the names agree."""
    assert function.__name__ in compat.__all__
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert re.search(rf"^{section}", text, re.MULTILINE), f"no section {section}"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +(\w+, )*{parameter}(, \w+)*:", text, re.MULTILINE), f"no {parameter}"
