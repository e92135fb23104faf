"""Modules of `effops.nn`: parameters, shapes, gradients, masks, autocast, copies, compilation, errors."""

import copy
import importlib
import pickle

import pytest
import torch

import effops
from effops.nn import BinNorm, MultiScaleDeformableAttention

SHAPES = [(6, 8), (3, 4)]
ROWS = 60


def make(**settings):
    torch.manual_seed(0)
    return MultiScaleDeformableAttention(**({"embed_dim": 32, "num_heads": 4, "num_levels": 2} | settings))


def inputs(frame=2, batch=2, queries=5, dtype=torch.float32):
    """query, reference_points, value"""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, queries, 32, generator=generator, dtype=dtype),
        torch.rand(batch, queries, 2, frame, generator=generator, dtype=dtype),
        torch.randn(batch, ROWS, 32, generator=generator, dtype=dtype),
    )


@pytest.fixture
def passed(monkeypatch):
    """The arguments of the last call of the op, by name; the op itself still runs."""
    module = importlib.import_module("effops.nn.ms_deform_attn")
    names = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
    arguments = {}
    op = module.ms_deform_attn

    def spy(*args):
        arguments.update(zip(names, args, strict=True))
        return op(*args)

    monkeypatch.setattr(module, "ms_deform_attn", spy)
    return arguments


def test_parameters_are_those_of_deformable_detr():
    state = MultiScaleDeformableAttention().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_initial_values():
    module = make()
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        assert not module.get_parameter(name).any(), name
    for projection in (module.value_proj, module.output_proj):
        bound = (6 / (32 + 32)) ** 0.5
        assert not projection.bias.any()
        assert 0.9 * bound < projection.weight.abs().max() <= bound
    offsets = module.sampling_offsets.bias.reshape(4, 2, 4, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for level in range(2):
        for point in range(4):
            assert torch.equal(offsets[:, level, point], directions * (point + 1))


def test_reset_parameters_restores_the_initial_values():
    module = make()
    torch.manual_seed(1)
    module.reset_parameters()
    initial = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    torch.manual_seed(1)
    module.reset_parameters()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, initial[name]), name


@pytest.mark.parametrize("frame", [2, 4])
@pytest.mark.parametrize("settings", [{}, {"num_points": 1}, {"value_proj_ratio": 0.5}, {"num_heads": 1}])
def test_output_shape(frame, settings):
    query, reference, value = inputs(frame)
    out = make(**settings)(query, reference, value, SHAPES)
    assert out.shape == (2, 5, 32)
    assert out.dtype == torch.float32


def test_value_proj_ratio_changes_the_projected_width(passed):
    module = make(value_proj_ratio=0.5)
    assert module.value_proj.weight.shape == (16, 32)
    assert module.output_proj.weight.shape == (32, 16)
    module(*inputs(), SHAPES)
    assert passed["value"].shape == (2, ROWS, 4, 4)


@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty(empty):
    query, reference, value = inputs(**{empty: 0})
    out = make()(query, reference, value, SHAPES)
    assert out.shape == query.shape
    out.sum().backward()


def test_weights_are_a_softmax_over_levels_and_points_jointly(passed):
    module = make()
    torch.nn.init.normal_(module.attention_weights.weight)
    query, reference, value = inputs()
    module(query, reference, value, SHAPES)
    odds = module.attention_weights(query).reshape(2, 5, 4, 8).exp()
    torch.testing.assert_close(passed["attention_weights"].flatten(3), odds / odds.sum(-1, keepdim=True))


def test_uniform_attention_of_a_constant_value():
    """Inside the map, constant values come back through both projections alone."""
    module = make(num_points=1)
    query, _, value = inputs()
    reference = torch.full((2, 5, 2, 2), 0.5)
    value = value[:, :1].expand(-1, ROWS, -1)
    expected = module.output_proj(module.value_proj(value[:, :5]))
    torch.testing.assert_close(module(query, reference, value, SHAPES), expected)


@pytest.mark.parametrize("frame", [2, 4])
def test_gradients_reach_every_parameter_and_input(frame):
    module = make()
    for layer in (module.sampling_offsets, module.attention_weights):
        torch.nn.init.normal_(layer.weight, std=0.1)
    tensors = [tensor.requires_grad_() for tensor in inputs(frame)]
    out = module(*tensors, SHAPES)
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    for tensor in tensors:
        assert tensor.grad.any()


def test_gradcheck():
    module = make(num_points=1).double()
    query, reference, value = inputs(frame=4, batch=1, queries=2, dtype=torch.float64)

    def attend(query, reference, value):
        return module(query, reference, value, SHAPES)

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in (query, reference, value)])


def test_padding_counts_as_zero_after_the_projection():
    module = make()
    torch.nn.init.normal_(module.value_proj.bias)
    query, reference, value = inputs()
    padding = torch.zeros(2, ROWS, dtype=torch.bool)
    padding[0, 10:] = True
    poisoned = value.masked_fill(padding[..., None], float("nan")).requires_grad_()
    out = module(query, reference, poisoned, SHAPES, padding_mask=padding)
    assert out.isfinite().all()
    unpadded = module(query, reference, value, SHAPES)
    assert torch.equal(out[1], unpadded[1])
    assert not torch.equal(out[0], unpadded[0])
    everything = module(query, reference, value, SHAPES, padding_mask=torch.ones_like(padding))
    torch.testing.assert_close(everything, module.output_proj.bias.expand_as(everything))
    (gradient,) = torch.autograd.grad(out.sum(), poisoned)
    assert not gradient[0, 10:].any()
    assert gradient[0, :10].any()


def test_level_starts_are_passed_on():
    """Levels stored in the other order give the same result."""
    module = make()
    query, reference, value = inputs()
    swapped = torch.cat([value[:, 48:], value[:, :48]], dim=1)
    out = module(query, reference, swapped, torch.tensor(SHAPES), torch.tensor([12, 0]))
    torch.testing.assert_close(out, module(query, reference, value, SHAPES))


@pytest.mark.parametrize("frame", [2, 4])
def test_shapes_as_a_list_or_a_tensor(frame):
    module = make()
    tensors = inputs(frame)
    assert torch.equal(module(*tensors, SHAPES), module(*tensors, torch.tensor(SHAPES)))


def test_strided_query():
    """A sequence-first query, transposed, as in many transformers."""
    module = make()
    query, reference, value = inputs()
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    expected = module(query, reference, value, SHAPES)
    torch.testing.assert_close(module(strided, reference, value, SHAPES), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frame", [2, 4])
def test_autocast_keeps_locations_in_float32(passed, frame, dtype):
    module = make()
    with torch.autocast("cpu", dtype):
        out = module(*inputs(frame), SHAPES)
    assert out.dtype == dtype
    assert passed["value"].dtype == dtype
    assert passed["sampling_locations"].dtype == torch.float32
    torch.testing.assert_close(out.float(), module(*inputs(frame), SHAPES), rtol=0.1, atol=0.05)


def test_half_parameters_keep_locations_in_float32(passed):
    module = make().bfloat16()
    query, reference, value = inputs()
    out = module(query.bfloat16(), reference, value.bfloat16(), SHAPES)
    assert out.dtype == torch.bfloat16
    assert passed["sampling_locations"].dtype == torch.float32


def test_double_parameters_keep_locations_in_float64(passed):
    make().double()(*inputs(dtype=torch.float64), SHAPES)
    assert passed["sampling_locations"].dtype == torch.float64


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(clone):
    module = make()
    tensors = inputs()
    assert torch.equal(clone(module)(*tensors, SHAPES), module(*tensors, SHAPES))


def test_device_and_dtype_arguments():
    assert make(dtype=torch.float64).value_proj.weight.dtype == torch.float64
    assert all(parameter.is_meta for parameter in make(device="meta").parameters())


@pytest.mark.parametrize("frame", [2, 4])
@pytest.mark.parametrize("shapes", [SHAPES, torch.tensor(SHAPES)], ids=["list", "tensor"])
def test_compile(frame, shapes):
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    padding = torch.arange(ROWS).expand(2, -1) % 7 == 0
    tensors = inputs(frame)
    expected = module(*tensors, shapes, padding_mask=padding)
    out = compiled(*tensors, shapes, padding_mask=padding)
    torch.testing.assert_close(out, expected)
    got = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    want = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    torch.testing.assert_close(got, want)


def test_compile_does_not_recompile_for_every_list_of_shapes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    query, reference, _ = inputs()
    for side in range(3, 9):
        shapes = [(side, side + 1), (2 * side, side + 5)]
        value = torch.randn(2, sum(height * width for height, width in shapes), 32)
        arguments = (query, reference, value, shapes)
        torch.testing.assert_close(compiled(*arguments), module(*arguments))
    assert counter.frame_count <= 2


def test_extra_repr():
    module = make(value_proj_ratio=0.5)
    settings = "embed_dim=32, num_heads=4, num_levels=2, num_points=4, value_proj_ratio=0.5"
    assert module.extra_repr() == settings
    assert settings in repr(module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 30}, "multiple of num_heads=4, got embed_dim=30"),
        ({"embed_dim": 0}, "expected embed_dim of at least 1, got 0"),
        ({"num_heads": 0}, "expected num_heads of at least 1"),
        ({"num_levels": 0}, "expected num_levels of at least 1"),
        ({"num_points": -1}, "expected num_points of at least 1, got -1"),
        ({"value_proj_ratio": 0.01}, "value_proj_ratio=0.01"),
        ({"value_proj_ratio": 0.3}, "value_proj_ratio=0.3"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"MultiScaleDeformableAttention: .*{message}"):
        make(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 5, 31)}, r"expected query of shape \[B, Q, E=32\], got \[2, 5, 31\]"),
        ({"query": torch.zeros(5, 32)}, "expected query of shape"),
        ({"query": torch.zeros(2, 6, 32)}, r"expected reference_points of shape \[B=2, Q=6, L=2, 2 or 4\]"),
        ({"value": torch.zeros(1, ROWS, 32)}, r"expected value of shape \[B=2, S, E=32\]"),
        ({"value": torch.zeros(2, ROWS, 31)}, "expected value of shape"),
        ({"reference_points": torch.zeros(2, 5, 2, 3)}, "expected reference_points of shape"),
        ({"reference_points": torch.zeros(2, 5, 2)}, "expected reference_points of shape"),
        ({"reference_points": torch.zeros(2, 5, 1, 2)}, "expected reference_points of shape"),
        ({"spatial_shapes": [(6, 10)]}, "expected spatial_shapes of 2 levels, got 1"),
        ({"padding_mask": torch.zeros(2, 1, dtype=torch.bool)}, "expected padding_mask of shape"),
    ],
)
def test_bad_shapes(change, message):
    query, reference, value = inputs()
    arguments = {"query": query, "reference_points": reference, "value": value, "spatial_shapes": SHAPES}
    with pytest.raises(ValueError, match=f"MultiScaleDeformableAttention: {message}"):
        make()(**(arguments | change))


def test_padding_mask_must_be_bool():
    with pytest.raises(TypeError, match="expected padding_mask of dtype torch.bool, got torch.float32"):
        make()(*inputs(), SHAPES, padding_mask=torch.zeros(2, ROWS))


# ------------------------------------------------------------------------------------ BinNorm


def logits(dtype=torch.float32):
    return torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_binnorm_is_soft_in_training():
    x = logits().requires_grad_()
    y = BinNorm(20)(x)
    assert torch.equal(y, effops.binnorm(x, 20))
    y[..., 0].sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_binnorm_is_hard_in_evaluation(dtype):
    """The k largest, with ties to the lowest index: the bits of topk_pack."""
    module = BinNorm(20).eval()
    x = logits(dtype).requires_grad_()
    y = module(x)
    assert y.dtype == dtype
    assert not y.requires_grad
    assert torch.equal(y.sum(-1), torch.full((3, 5), 20.0, dtype=dtype))
    assert torch.equal(effops.pack_bits(y), effops.topk_pack(x, module.k))
    ties = module(torch.zeros(70, dtype=dtype))
    assert torch.equal(ties, (torch.arange(70) < 20).to(dtype))


def test_binnorm_agrees_with_itself_on_steep_logits():
    module = BinNorm(20)
    x = torch.randperm(70, generator=torch.Generator().manual_seed(0)) * 100.0
    torch.testing.assert_close(module(x), module.eval()(x))


@pytest.mark.compile
@pytest.mark.parametrize("training", [True, False])
def test_binnorm_compiled(training):
    module = BinNorm(20).train(training)
    x = logits()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))


def test_binnorm_has_no_state():
    module = BinNorm(k=20)
    assert module.state_dict() == {}
    assert repr(module) == "BinNorm(k=20)"
    assert copy.deepcopy(module).k == pickle.loads(pickle.dumps(module)).k == 20


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (-1, ValueError, "k >= 0, got -1"),
        (2.5, TypeError, "k of type int, got float"),
        (True, TypeError, "k of type int, got bool"),
        (None, TypeError, "k of type int, got NoneType"),
    ],
)
def test_binnorm_bad_settings(k, error, message):
    with pytest.raises(error, match=f"^BinNorm: expected {message}"):
        BinNorm(k)


@pytest.mark.parametrize(("training", "op"), [(True, "binnorm"), (False, "topk_pack")])
def test_binnorm_of_short_rows(training, op):
    with pytest.raises(ValueError, match=rf"^{op}: expected k in \[0, 70\], got 71"):
        BinNorm(71).train(training)(logits())
