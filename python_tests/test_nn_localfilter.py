"""The modules of the per-pixel filters: settings, definitions in plain PyTorch, transforms, training."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

import effops
from effops import reference
from effops.nn import FilterFlow, LocalAttention2d
from effops.testing import assert_close
from effops.testing._check import tensors_of


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def attention(channels=6, window=3, **settings):
    torch.manual_seed(0)
    return LocalAttention2d(channels, window, **settings)


# ------------------------------------------------------------------------------------ FilterFlow

FILTER_SETTINGS = [
    {},
    {"normalize": "none", "padding_mode": "replicate", "dilation": 2},
    {"normalize": "sum", "padding_mode": "reflect", "return_flow": True, "stride": 2},
    {"padding_mode": "renormalize", "return_flow": True, "upsample": 2, "groups": 2},
]


@pytest.mark.parametrize("settings", FILTER_SETTINGS, ids=lambda settings: "-".join(settings) or "default")
def test_filter_flow_passes_its_settings(settings):
    height, width = 5, 7
    sides = [-(-side * settings.get("upsample", 1) // settings.get("stride", 1)) for side in (height, width)]
    image = normal(2, 4, height, width)
    filters = normal(2, 9 * settings.get("groups", 1), *sides, seed=1).abs()
    found = FilterFlow(**settings)(image, filters)
    expected = effops.filter_flow(image, filters, **settings)
    assert isinstance(found, tuple) == settings.get("return_flow", False)
    for actual, wanted in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(actual, wanted)


def test_filter_flow_shows_its_settings():
    assert repr(FilterFlow()) == "FilterFlow(normalize='softmax', padding_mode='zeros')"
    module = FilterFlow("none", "reflect", True, stride=2, groups=3)
    assert repr(module) == (
        "FilterFlow(normalize='none', padding_mode='reflect', return_flow=True, stride=2, groups=3)"
    )
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("settings", "error", "blamed"),
    [
        ({"normalize": "Softmax"}, ValueError, "normalize"),
        ({"padding_mode": "constant"}, ValueError, "padding_mode"),
        ({"normalize": None}, ValueError, "normalize"),
        ({"stride": 0}, ValueError, "stride"),
        ({"upsample": -1}, ValueError, "upsample"),
        ({"dilation": 2**31}, ValueError, "dilation"),
        ({"groups": 0}, ValueError, "groups"),
        ({"stride": 2, "upsample": 2}, ValueError, "stride or upsample"),
        ({"dilation": 1.5}, TypeError, "dilation"),
        ({"groups": None}, TypeError, "groups"),
    ],
    ids=str,
)
def test_filter_flow_refuses(settings, error, blamed):
    with pytest.raises(error, match=rf"^FilterFlow: expected {blamed}"):
        FilterFlow(**settings)


def test_filters_learn_a_shift():
    """What predictive filter flow relies on: photometric training finds the displacement."""
    image = normal(1, 3, 12, 14)
    target = functional.pad(image, (2, 0, 0, 1))[..., 1:, :14]  # target(y, x) = image(y + 1, x - 2)
    logits = nn.Parameter(torch.zeros(1, 25, 12, 14))
    module = FilterFlow(padding_mode="zeros", return_flow=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(60):
        out, flow = module(image, logits)
        loss = (out - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inside = flow.detach()[0, :, 2:-2, 2:-2]
    assert loss < 0.1
    assert (inside - torch.tensor([-2.0, 1.0]).view(2, 1, 1)).abs().median() < 0.05


# ------------------------------------------------------------------------------------ LocalAttention2d


def by_heads(module, x, context):
    """The definition: plain convolutions around the reference, head by head."""
    q, k, v = module.q_proj(x), module.k_proj(context), module.v_proj(context)
    heads = [
        reference.local_attention(*maps, module.window, module.dilation, border=module.border)
        for maps in zip(*(maps.chunk(module.num_heads, dim=1) for maps in (q, k, v)), strict=True)
    ]
    return module.out_proj(torch.cat(heads, dim=1))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 4, "num_heads": 3, "dilation": 2, "border": "zero"},
        {"key_channels": 4, "out_channels": 8, "num_heads": 2, "bias": False},
        {"context_channels": 5, "key_channels": 3, "out_channels": 9, "num_heads": 3},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_agrees_with_its_definition(settings, dtype):
    module = attention(**settings, dtype=dtype)
    x = normal(2, 6, 5, 7, dtype=dtype).requires_grad_()
    context = normal(2, module.context_channels, 5, 7, seed=1, dtype=dtype).requires_grad_()
    found, expected = module(x, context), by_heads(module, x, context)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(found.detach(), expected.detach(), tolerance)
    inputs = [x, context, *module.parameters()]
    incoming = normal(*found.shape, seed=2, dtype=dtype)
    wanted = torch.autograd.grad(expected, inputs, incoming)
    for actual, gradient in zip(torch.autograd.grad(found, inputs, incoming), wanted, strict=True):
        if gradient.abs().max() > 1e-6:  # the bias of k has none: it changes no softmax
            assert_close(actual, gradient, 10 * tolerance)


def test_large_windows_attend_to_everything():
    """With a window of twice the image, masked at the border: dense multi-head attention."""
    module = attention(8, 2 * 5 + 1, num_heads=2)
    x = normal(3, 8, 4, 5)
    q, k, v = (
        proj(x).unflatten(1, (2, 4)).flatten(3).mT for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    dense = functional.scaled_dot_product_attention(q, k, v)  # [N, heads, H * W, channels of a head]
    expected = module.out_proj(dense.mT.flatten(1, 2).unflatten(2, (4, 5)))
    assert_close(module(x).detach(), expected.detach(), 1e-5)


def test_attention_to_itself_is_the_default():
    module, x = attention(), normal(2, 6, 4, 5)
    assert torch.equal(module(x), module(x, x))
    assert not torch.equal(module(x), module(x, normal(2, 6, 4, 5, seed=1)))


def test_attention_keeps_channels_last():
    x = normal(2, 6, 4, 5)
    for heads in (1, 2):
        module = attention(num_heads=heads)
        last = module(x.contiguous(memory_format=torch.channels_last))
        assert_close(last.detach(), module(x).detach(), 1e-5)
    assert attention()(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_attention_parameters():
    module = attention(8, key_channels=4, out_channels=6, context_channels=3)
    shapes = {name: tuple(parameter.shape[:2]) for name, parameter in module.named_parameters()}
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if "weight" in name}
    assert weights == {"q_proj": (4, 8), "k_proj": (4, 3), "v_proj": (6, 3), "out_proj": (6, 6)}
    assert not any("bias" in name for name in attention(bias=False).state_dict())
    assert "window=3, num_heads=1, dilation=1, border='mask'" in repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_under_autocast(dtype):
    module, x = attention(), normal(2, 6, 4, 5)
    with torch.autocast("cpu", dtype):
        out = module(x)
    assert out.dtype == dtype
    assert_close(out.detach().float(), module(x).detach(), 0.05)
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_attention_is_copied_and_stored():
    module, x = attention(num_heads=2), normal(2, 6, 4, 5)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = LocalAttention2d(6, 3, num_heads=2)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    ("settings", "error", "blamed"),
    [
        ({"channels": 0}, ValueError, "channels"),
        ({"window": 0}, ValueError, "window"),
        ({"dilation": -1}, ValueError, "dilation"),
        ({"num_heads": 4}, ValueError, "key_channels"),
        ({"key_channels": 4, "num_heads": 4}, ValueError, "out_channels"),
        ({"out_channels": 0}, ValueError, "out_channels"),
        ({"border": "zeros"}, ValueError, "border"),
        ({"window": 3.0}, TypeError, "window"),
        ({"num_heads": None}, TypeError, "num_heads"),
    ],
    ids=str,
)
def test_attention_refuses_settings(settings, error, blamed):
    with pytest.raises(error, match=rf"^LocalAttention2d: expected {blamed}"):
        attention(**settings)


def test_attention_refuses_inputs():
    module, x = attention(context_channels=5), normal(2, 6, 4, 7)
    wrong = {
        "x of shape": [(x[0], None), (x[:, 1:], normal(2, 5, 4, 7)), (x, None)],
        "context of shape": [(x, x), (x, normal(1, 5, 4, 7)), (x, normal(2, 5, 7, 4)), (x, normal(5, 4, 7))],
    }
    for blamed, inputs in wrong.items():
        for pair in inputs:
            with pytest.raises(ValueError, match=rf"^LocalAttention2d: expected {blamed}"):
                module(*pair)


@pytest.mark.compile
@pytest.mark.parametrize("make", [lambda: attention(num_heads=2), lambda: attention(border="zero")])
def test_attention_compiles_and_exports(make):
    module, x = make(), normal(2, 6, 5, 7)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((2, 6, 5, 7), (3, 6, 8, 9)):
        x = normal(*size)
        assert_close(compiled(x).detach(), module(x).detach(), 1e-5)
    program = torch.export.export(module, (x,))
    assert_close(program.module()(x).detach(), module(x).detach(), 1e-5)
    assert any(node.target is torch.ops.effops.local_attention.default for node in program.graph.nodes)


@pytest.mark.compile
def test_filter_flow_compiles():
    module = FilterFlow(return_flow=True, upsample=2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    image, filters = normal(1, 3, 4, 5), normal(1, 9, 8, 10, seed=1)
    for actual, wanted in zip(compiled(image, filters), module(image, filters), strict=True):
        assert_close(actual, wanted, 1e-6)
