"""The modules on SPS, and SPS and plans of masks on their way through torch's compilers and transforms."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional

import effops
from effops import SPS, MaskPlan
from effops.nn import SPSConv2d, SPSFusion


def make_sps(features=4, maps=3, height=6, width=5, active=30, dtype=torch.float32, seed=0):
    """A random SPS after one refinement, so that passive rows stand in four cells each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(maps, features, height, width, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.randperm(maps * height * width, generator=generator).view(maps, height, width) < active
    scores = torch.randn(active, generator=generator)
    return effops.sps_refine(effops.sps_from_dense(x, mask), scores, active // 2)


def active_cells(dense, sps):
    """The rows of maps [R, C, H, W] at the active cells."""
    x, y = sps.xy.long().unbind(1)
    return dense[sps.roi.long(), :, y, x]


def conv(**settings):
    torch.manual_seed(0)
    return SPSConv2d(**({"in_channels": 4, "out_channels": 4} | settings))


def fusion(**settings):
    torch.manual_seed(0)
    return SPSFusion(**({"channels": 4} | settings))


BOTH = pytest.mark.parametrize("make", [conv, fusion])

# ------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("dilation", "bias", "activation"), [(1, True, None), (3, False, "relu")])
def test_conv_is_the_dense_one_at_the_active_cells(kernel_size, dilation, bias, activation):
    module = conv(
        out_channels=7, kernel_size=kernel_size, dilation=dilation, bias=bias, activation=activation
    )
    sps = make_sps()
    padding = dilation * (kernel_size // 2)
    dense = functional.conv2d(
        effops.sps_to_dense(sps), module.weight, module.bias, padding=padding, dilation=dilation
    )
    expected = active_cells(dense.relu() if activation else dense, sps)
    torch.testing.assert_close(module(sps).active, expected)


def test_fusion_is_the_dense_one_at_the_active_cells():
    """The order of the author's code: the first linear layer on active features, ReLU before the sum."""
    module = fusion()
    sps = make_sps()
    active = module.input_proj(sps.active).relu()
    mixed = SPS(active, sps.passive, sps.index_map, sps.roi, sps.xy)
    dense = effops.sps_to_dense(mixed)
    total = 0
    for branch, d in zip(module.convs, (1, 3, 5), strict=True):
        total = total + functional.conv2d(dense, branch.weight, branch.bias, padding=d, dilation=d).relu()
    first, _, second, _ = module.output_proj
    expected = second(first(active_cells(total, sps)).relu()).relu()
    torch.testing.assert_close(module(sps).active, expected)


@BOTH
def test_all_but_the_active_features_is_shared(make):
    sps = make_sps()
    result = make()(sps)
    assert isinstance(result, SPS)
    assert result.active is not sps.active
    for field in ("passive", "index_map", "roi", "xy"):
        assert getattr(result, field) is getattr(sps, field)


def test_parameters():
    assert {name: tuple(p.shape) for name, p in conv(out_channels=7).named_parameters()} == {
        "weight": (7, 4, 3, 3),
        "bias": (7,),
    }
    assert list(conv(bias=False).state_dict()) == ["weight"]
    assert list(fusion(dilations=(1, 2)).state_dict()) == [
        f"{layer}.{name}"
        for layer in ("input_proj", "convs.0", "convs.1", "output_proj.0", "output_proj.2")
        for name in ("weight", "bias")
    ]


def test_parameters_of_effseg():
    """Of its three processing modules together, as counted from the author's code."""
    stages = [SPSFusion(channels, device="meta") for channels in (128, 64, 32)]
    assert sum(p.numel() for stage in stages for p in stage.parameters()) == 646_464


def test_initial_values_are_those_of_conv2d():
    module = conv(in_channels=6, kernel_size=5)
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 4, 5)
    assert torch.equal(module.weight, dense.weight)
    assert torch.equal(module.bias, dense.bias)


@BOTH
def test_reset_parameters_restores_the_initial_values(make):
    module = make()
    torch.manual_seed(1)
    module.reset_parameters()
    initial = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    torch.manual_seed(1)
    module.reset_parameters()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, initial[name]), name


@BOTH
def test_gradients_reach_every_parameter_and_both_kinds_of_features(make):
    module, sps = make(), make_sps()
    sps.active.requires_grad_()
    sps.passive.requires_grad_()
    module(sps).active.square().sum().backward()
    for name, tensor in (*module.named_parameters(), ("active", sps.active), ("passive", sps.passive)):
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


@BOTH
@pytest.mark.parametrize("mask", [False, True], ids=["all_passive", "all_active"])
def test_one_kind_of_cells(make, mask):
    x = torch.randn(2, 4, 3, 5)
    sps = effops.sps_from_dense(x, torch.full((2, 3, 5), mask))
    result = make()(sps)
    assert result.active.shape == sps.active.shape
    result.active.sum().backward()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_features_of_one_dtype(make, dtype):
    module, sps = make(), make_sps()
    with torch.autocast("cpu", dtype):
        result = module(sps)
    assert result.active.dtype == result.passive.dtype == dtype
    result.validate()
    torch.testing.assert_close(result.active.float(), module(sps).active, rtol=0.1, atol=0.05)
    assert effops.sps_to_dense(result).dtype == dtype  # outside of autocast


@BOTH
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(make, clone):
    module, sps = make(), make_sps()
    assert torch.equal(clone(module)(sps).active, module(sps).active)


@BOTH
def test_device_and_dtype_arguments(make):
    assert all(parameter.is_meta for parameter in make(device="meta").parameters())
    module = make(dtype=torch.float64)
    assert module(make_sps(dtype=torch.float64)).active.dtype == torch.float64


def test_repr():
    assert repr(conv(dilation=3, bias=False, activation="relu")) == (
        "SPSConv2d(4, 4, kernel_size=3, dilation=3, bias=False, activation='relu')"
    )
    assert "channels=4, dilations=(1, 3, 5)" in repr(fusion())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 0}, "expected in_channels of at least 1, got 0"),
        ({"out_channels": -1}, "expected out_channels of at least 1, got -1"),
        ({"kernel_size": 0}, "expected kernel_size of at least 1, got 0"),
        ({"kernel_size": 2}, "expected an odd kernel_size, got 2"),
        ({"dilation": 0}, "expected dilation of at least 1, got 0"),
        ({"activation": "gelu"}, "expected activation None or .relu., got 'gelu'"),
    ],
)
def test_bad_settings_of_the_convolution(settings, message):
    with pytest.raises(ValueError, match=f"^SPSConv2d: {message}"):
        conv(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "SPSFusion: expected channels of at least 1, got 0"),
        ({"dilations": ()}, "SPSFusion: expected at least one of dilations, got none"),
        ({"dilations": (1, 0)}, "SPSConv2d: expected dilation of at least 1, got 0"),
        ({"kernel_size": 4}, "SPSConv2d: expected an odd kernel_size, got 4"),
    ],
)
def test_bad_settings_of_the_fusion(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fusion(**settings)


def test_features_of_another_width():
    with pytest.raises(ValueError, match=r"^sps_conv2d: expected weight\[0\] of shape"):
        conv()(make_sps(features=5))


# ------------------------------------------------------------------------------------ SPS in the compilers


class Stage(nn.Module):
    """Two layers and a refinement by the scores of a third."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fusion = SPSFusion(4)
        self.conv = SPSConv2d(4, 4)
        self.score = nn.Linear(4, 1)

    def forward(self, sps):
        sps = self.conv(self.fusion(sps))
        return effops.sps_refine(sps, self.score(sps.active)[:, 0], 7)


def assert_same_sps(actual, expected):
    assert isinstance(actual, SPS)
    for field in ("active", "passive", "index_map", "roi", "xy"):
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field))


@pytest.mark.compile
def test_sps_through_compile():
    """One graph for all sizes, forward and backward."""
    stage = Stage()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stage, backend=counter, fullgraph=True, dynamic=True)
    for seed, (height, width) in enumerate([(6, 5), (7, 8), (9, 4)]):
        sps = make_sps(height=height, width=width, seed=seed)
        result, expected = compiled(sps), stage(sps)
        assert_same_sps(result, expected)
        found, wanted = (
            torch.autograd.grad(out.active.sum() + out.passive.sum(), list(stage.fusion.parameters()))
            for out in (result, expected)
        )
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1


@pytest.mark.compile
def test_sps_made_inside_of_a_graph():
    """The numbers of rows depend on the mask, the sizes of all that follows on them."""

    def run(x, mask):
        sps = effops.sps_from_dense(x, mask)
        sps = effops.sps_refine(sps, sps.active.sum(1), 5)
        return effops.sps_to_dense(SPS(2 * sps.active, sps.passive, sps.index_map, sps.roi, sps.xy))

    x = torch.randn(2, 3, 6, 5)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for share in (0.3, 0.6, 0.0):
            mask = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)) < share
            torch.testing.assert_close(compiled(x, mask), run(x, mask))


def test_ids_become_wide_from_2_31_rows_on():
    """By the fake kernels, which need no memory."""
    for maps, dtype in ((2**15 - 1, torch.int32), (2**15, torch.int64)):
        with FakeTensorMode(shape_env=ShapeEnv()):
            x, mask = torch.empty(maps, 1, 256, 256), torch.empty(maps, 256, 256, dtype=torch.bool)
            assert effops.sps_from_dense(x, mask).index_map.dtype == dtype
            rows = maps * 2**14
            ids, cells = torch.empty(1, 1, 1, dtype=torch.int32), torch.empty(rows, 2, dtype=torch.int32)
            sps = SPS(torch.empty(rows, 1), torch.empty(1, 1), ids, cells[:, 0], cells)
            assert effops.sps_refine(sps, torch.empty(rows), rows).index_map.dtype == dtype


@pytest.mark.compile
@pytest.mark.parametrize("strict", [False, True])
def test_sps_through_export(strict):
    """In and out of a saved program, with numbers of rows that vary."""
    stage, sps = Stage(), make_sps()
    rows, passives = Dim("rows"), Dim("passives")
    fields = [{0: rows}, {0: passives}, None, {0: rows}, {0: rows}]
    with torch.no_grad():
        program = torch.export.export(stage, (sps,), dynamic_shapes=([*fields],), strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        other = make_sps(active=22)
        for module in (program.module(), torch.export.load(file).module()):
            for inputs in (sps, other):
                assert_same_sps(module(inputs), stage(inputs))


def test_sps_through_vmap():
    members = [make_sps(seed=seed) for seed in range(3)]
    stacked = SPS(*(torch.stack(tensors) for tensors in zip(*map(fields_of, members), strict=True)))
    module = conv().requires_grad_(False)
    found = torch.vmap(module)(stacked)
    for k, member in enumerate(members):
        assert_same_sps(SPS(*(tensor[k] for tensor in fields_of(found))), module(member))


@pytest.mark.parametrize("field", ["index_map", "roi", "xy"])
def test_vmap_finds_ids_that_would_be_those_of_another_member(field):
    sps = make_sps()
    ends = {"index_map": len(sps.active) + len(sps.passive), "roi": 3, "xy": 12}
    stacked = [torch.stack([tensor, tensor]) for tensor in fields_of(sps)]
    wrong = SPS(*stacked)
    getattr(wrong, field).flatten(1)[0, -1] = ends[field]
    with pytest.raises(ValueError, match=f"^sps_conv2d: expected {field}"):
        torch.vmap(conv().requires_grad_(False))(wrong)


def test_vmap_without_members():
    sps = make_sps()
    nobody = SPS(*(tensor.new_empty(0, *tensor.shape) for tensor in fields_of(sps)))
    assert torch.vmap(effops.sps_to_dense)(nobody).shape == (0, 3, 4, 12, 10)
    weights = torch.empty(0, 5, 4, 3, 3)
    found = torch.vmap(effops.sps_conv2d, in_dims=(*(None,) * 5, 0))(*fields_of(sps), weights)
    assert found.shape == (0, 60, 5)


def fields_of(sps):
    return sps.active, sps.passive, sps.index_map, sps.roi, sps.xy


# ------------------------------------------------------------------------------------ plans of masks


class Block(nn.Module):
    """Two layers that share a plan."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 1)

    def forward(self, x, plan):
        x = effops.perforated_conv2d(x, self.first.weight, plan, self.first.bias, padding=1, fill="nearest")
        return effops.perforated_conv2d(x.relu(), self.second.weight, plan, self.second.bias)


def make_mask(share=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 6, generator=generator) * (torch.rand(2, 5, 6, generator=generator) < share)


def test_a_plan_stands_for_its_mask():
    block, x = Block(), torch.randn(2, 3, 5, 6)
    results = []
    for form in (lambda mask: mask, effops.plan_mask):
        mask = make_mask().requires_grad_()
        out = block(x, form(mask))
        (gradient,) = torch.autograd.grad(out.square().sum(), mask)
        results.append((out, gradient))
    for of_plan, of_mask in zip(*results, strict=True):
        assert torch.equal(of_plan, of_mask)
    assert results[0][1].any()


@pytest.mark.compile
def test_a_plan_made_inside_of_a_graph():
    block = Block()

    def run(x, mask):
        return block(x, effops.plan_mask(mask))

    x = torch.randn(2, 3, 5, 6)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for share in (0.4, 0.7, 0.0):
            torch.testing.assert_close(compiled(x, make_mask(share)), run(x, make_mask(share)))


@pytest.mark.compile
def test_a_plan_through_export():
    block, x = Block(), torch.randn(2, 3, 5, 6)
    plan, other = effops.plan_mask(make_mask()), effops.plan_mask(make_mask(seed=1))
    assert plan.count != other.count
    shapes = (None, [None, {0: Dim("count")}, None])
    with torch.no_grad():
        module = torch.export.export(block, (x, plan), dynamic_shapes=shapes).module()
        for inputs in (plan, other):
            torch.testing.assert_close(module(x, inputs), block(x, inputs))


def test_plans_through_vmap():
    """One plan for all members, and one for each of them (which keep the same number of positions)."""
    block = Block().requires_grad_(False)
    masks = torch.stack([make_mask(), make_mask().flip(0), make_mask().flip(1)])
    images = torch.randn(3, 2, 3, 5, 6)
    plans = [effops.plan_mask(mask) for mask in masks]
    found = torch.vmap(block, in_dims=(0, None))(images, plans[0])
    for k, image in enumerate(images):
        torch.testing.assert_close(found[k], block(image, plans[0]))
    stacked = MaskPlan(masks, torch.stack([p.positions for p in plans]), torch.stack([p.rows for p in plans]))
    found = torch.vmap(block)(images, stacked)
    for k, image in enumerate(images):
        torch.testing.assert_close(found[k], block(image, plans[k]))


def test_flops_of_a_plan_are_those_of_its_positions():
    block, x, plan = Block(), torch.randn(2, 3, 5, 6), effops.plan_mask(make_mask())
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        block(x, plan)
    assert counter.get_total_flops() == 2 * plan.count * (3 * 6 * 9 + 6 * 3)
