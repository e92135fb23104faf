"""Golden values of the SPS and the ops that make one: the toy of the thesis, dense maps as the oracle."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients, parts, random_mask, toy_sps

import effops


def cells(sps):
    """The cells of the active rows as an index into [R, H, W]."""
    x, y = sps.xy.long().unbind(1)
    return sps.roi.long(), y, x


# ------------------------------------------------------------------------------------ several stages


def refine_dense(x, active, scores, num_refine):
    """Oracle of sps_refine on maps: features [R, F, H, W], active cells and scores [R, H, W]."""
    lowest_kept = scores[active].sort(descending=True).values[num_refine - 1]
    kept = active & (scores >= lowest_kept)
    return [part.repeat_interleave(2, -1).repeat_interleave(2, -2) for part in (x, kept)]


def assert_consistent(sps, cells_per_passive):
    """The invariants of the id map; passive rows cover numbers of cells of the given set."""
    sps.validate()
    count = torch.bincount(sps.index_map.flatten().long(), minlength=len(sps.active) + len(sps.passive))
    assert (count[: len(sps.active)] == 1).all()
    assert set(count[len(sps.active) :].tolist()) <= cells_per_passive
    assert count.sum() == sps.index_map.numel()
    assert torch.equal(sps.index_map[cells(sps)].long(), torch.arange(len(sps.active)))


def test_three_stages_agree_with_dense_maps(sps_from_dense, sps_to_dense, sps_refine, sps_conv2d):
    """Refine, convolve, put the results in; three times, and the gradients of all of it."""
    x = double(2, 3, 3, 4).requires_grad_()
    weights = [(double(3, 3, 3, 3, seed=seed) / 3).requires_grad_() for seed in range(1, 4)]
    active = torch.ones(2, 3, 4, dtype=torch.bool)
    sps, dense = sps_from_dense(x, active), x
    for stage, (weight, keep, dilation) in enumerate(zip(weights, (9, 20, 31), (1, 3, 2), strict=True)):
        scores = double(*active.shape, seed=10 + stage)
        before = len(sps.active) + len(sps.passive)
        sps = sps_refine(sps, scores[cells(sps)], keep)
        dense, active = refine_dense(dense, active, scores, keep)
        assert (len(sps.active), len(sps.passive)) == (4 * keep, before - keep)
        assert_consistent(sps, {4**j for j in range(stage + 2)})
        assert torch.equal(sps.index_map < len(sps.active), active)

        sps = replace(sps, active=sps_conv2d(*parts(sps), weight, None, dilation, "relu"))
        new = F.conv2d(dense, weight, padding=dilation, dilation=dilation).relu()
        dense = torch.where(active[:, None], new, dense)
        assert_near(sps_to_dense(sps), dense)
    leaves, grad_output = [x, *weights], double(*dense.shape, seed=20)
    actual = gradients(sps_to_dense(sps), leaves, grad_output)
    for got, wanted in zip(actual, gradients(dense, leaves, grad_output), strict=True):
        assert_near(got, wanted)


def test_sizes_of_effseg(sps_from_dense, sps_refine):
    """100 RoIs of 14 x 14 to 112 x 112 with 10 000 refined cells: 24.2, 19.4 and 13.4 MiB of features."""
    sps = sps_from_dense(torch.zeros(100, 1, 14, 14), torch.ones(100, 14, 14, dtype=torch.bool))
    for stage, (passive, features, mebibytes) in enumerate(
        [(9600, 128, 24.2), (39600, 64, 19.4), (69600, 32, 13.4)]
    ):
        sps = sps_refine(sps, torch.zeros(len(sps.active)), 10000)
        assert (len(sps.active), len(sps.passive)) == (40000, passive)
        assert sps.index_map.shape == (100, 28 << stage, 28 << stage)
        size = 4 * features * (len(sps.active) + len(sps.passive)) / 2**20
        assert size == pytest.approx(mebibytes, abs=0.05)


# ------------------------------------------------------------------------------------ sps_refine


def test_toy_refine(sps_refine):
    sps = sps_refine(toy_sps(), torch.tensor([4.0, 1.0, 2.0, 3.0]), 2)
    assert sps.active.flatten().tolist() == [1, 1, 1, 1, 4, 4, 4, 4]
    assert sps.passive.flatten().tolist() == [5, 6, 7, 2, 3]
    assert sps.index_map[0].tolist() == [
        [0, 1, 11, 11, 9, 9],
        [2, 3, 11, 11, 9, 9],
        [12, 12, 4, 5, 9, 9],
        [12, 12, 6, 7, 9, 9],
        [8, 8, 10, 10, 10, 10],
        [8, 8, 10, 10, 10, 10],
    ]
    assert sps.xy.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [2, 2], [3, 2], [2, 3], [3, 3]]
    assert sps.roi.tolist() == [0] * 8
    assert (sps.index_map.dtype, sps.roi.dtype, sps.xy.dtype) == (torch.int32,) * 3
    sps.validate()


def test_toy_refine_without_upsampling(sps_refine):
    sps = sps_refine(toy_sps(map_dtype=torch.int64), torch.tensor([4.0, 1.0, 2.0, 3.0]), 2, upsample=False)
    assert sps.active.flatten().tolist() == [1, 4]
    assert sps.passive.flatten().tolist() == [5, 6, 7, 2, 3]
    assert sps.index_map.tolist() == [[[0, 5, 3], [6, 1, 3], [2, 4, 4]]]
    assert sps.index_map.dtype == torch.int64
    assert sps.xy.tolist() == [[0, 0], [1, 1]]
    sps.validate()


@pytest.mark.parametrize(
    ("scores", "num_refine", "kept"),
    [
        ([1, 1, 1, 1], 2, [0, 1]),  # ties: the lowest rows
        ([0, 2, 1, 2], 2, [1, 3]),
        ([0, 2, 1, 2], 1, [1]),
        ([0, 2, 2, 1], 3, [1, 2, 3]),  # rows keep their order
        ([-0.0, 0.0, 0.0, -1.0], 1, [0]),
        ([0, NAN, INF, NAN], 2, [1, 3]),  # NaN is above all numbers
        ([INF, NAN, INF, -INF], 2, [0, 1]),
        ([-INF, -INF, -INF, -INF], 1, [0]),
        ([3, 2, 1, 0], 0, []),
        ([3, 2, 1, 0], 4, [0, 1, 2, 3]),
        ([3, 2, 1, 0], 2**40, [0, 1, 2, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_which_rows_are_kept(sps_refine, scores, num_refine, kept, dtype):
    sps = sps_refine(toy_sps(), torch.tensor(scores, dtype=dtype), num_refine, upsample=False)
    others = [row for row in range(4) if row not in kept]
    assert sps.active.flatten().tolist() == [row + 1 for row in kept]
    assert sps.passive.flatten().tolist() == [5, 6, 7] + [row + 1 for row in others]
    sps.validate()


@pytest.mark.parametrize("upsample", [False, True])
def test_refine_gradients(sps_refine, upsample):
    """A kept row gets the sum of its children's gradients; all other rows are copies."""
    sps = toy_sps()
    leaves = [sps.active.requires_grad_(), sps.passive.requires_grad_()]
    new = sps_refine(sps, torch.tensor([4.0, 1.0, 2.0, 3.0], requires_grad=True), 2, upsample)
    children = 4 if upsample else 1
    weighted = (new.active[:, 0] * (10.0 ** torch.arange(2 * children)).double()).sum()
    active, passive = gradients(weighted + (new.passive[:, 0] * torch.arange(1.0, 6.0)).sum(), leaves)
    assert active.flatten().tolist() == ([1111, 4, 5, 11110000] if upsample else [1, 4, 5, 10])
    assert passive.flatten().tolist() == [1, 2, 3]


def test_refine_across_maps(sps_from_dense, sps_to_dense, sps_refine):
    """The scores of all maps compete."""
    x, mask = double(3, 2, 2, 3), random_mask(3, 2, 3, density=0.7)
    sps = sps_from_dense(x, mask)
    new = sps_refine(sps, -sps.roi.double(), int(mask[0].sum()))
    assert (new.roi == 0).all()
    assert_consistent(new, {4})
    assert torch.equal(sps_to_dense(new), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


# ------------------------------------------------------------------------------------ dense maps


def test_from_dense_by_hand(sps_from_dense):
    x = torch.arange(12.0).view(2, 1, 2, 3)
    mask = torch.tensor([[[0, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 0]]], dtype=torch.bool)
    sps = sps_from_dense(x, mask).validate()
    assert sps.active.flatten().tolist() == [1, 3, 8]
    assert sps.passive.flatten().tolist() == [0, 2, 4, 5, 6, 7, 9, 10, 11]
    assert sps.index_map.tolist() == [[[3, 0, 4], [1, 5, 6]], [[7, 8, 2], [9, 10, 11]]]
    assert sps.roi.tolist() == [0, 0, 1]
    assert sps.xy.tolist() == [[1, 0], [0, 1], [2, 0]]
    assert (sps.index_map.dtype, sps.roi.dtype, sps.xy.dtype) == (torch.int32,) * 3


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_round_trip(sps_from_dense, sps_to_dense, density, dtype):
    x = double(3, 5, 4, 6).to(dtype).requires_grad_()
    mask = random_mask(3, 4, 6, density=density)
    sps = sps_from_dense(x, mask)
    assert (len(sps.active), len(sps.passive)) == (mask.sum(), (~mask).sum())
    out = sps_to_dense(sps.validate())
    assert torch.equal(out, x)
    assert out.is_contiguous()
    grad_output = double(*x.shape, seed=1).to(dtype)
    assert torch.equal(gradients(out, [x], grad_output)[0], grad_output)


def test_toy_to_dense(sps_to_dense):
    sps = toy_sps()
    leaves = [sps.active.requires_grad_(), sps.passive.requires_grad_()]
    out = sps_to_dense(sps)
    assert out.tolist() == [[[[1, 2, 6], [3, 4, 6], [5, 7, 7]]]]
    active, passive = gradients(out, leaves, torch.arange(9.0).double().view(1, 1, 3, 3))
    assert active.flatten().tolist() == [0, 1, 3, 4]
    assert passive.flatten().tolist() == [6, 2 + 5, 7 + 8]


@pytest.mark.parametrize("empty", ["R", "F", "H", "W"])
def test_empty(sps_from_dense, sps_to_dense, sps_refine, sps_conv2d, empty):
    r, f, h, w = (0 if name == empty else 2 for name in "RFHW")
    x = torch.ones(r, f, h, w, requires_grad=True)
    weight = torch.ones(4, f, 3, 3, requires_grad=True)
    sps = sps_from_dense(x, torch.ones(r, h, w, dtype=torch.bool))
    sps = sps_refine(sps, torch.zeros(len(sps.active)), 3)
    out = sps_conv2d(*parts(sps), weight)
    assert out.shape == (12 if empty == "F" else 0, 4)
    assert not out.any()
    dense = sps_to_dense(sps.validate())
    assert dense.shape == (r, f, 2 * h, 2 * w)
    (out.sum() + dense.sum()).backward()
    for leaf in (x, weight):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


# ------------------------------------------------------------------------------------ the dataclass


@pytest.mark.parametrize(
    ("field", "position", "number", "message"),
    [
        ("index_map", (0, 2, 2), 7, r"index_map in \[0, NA \+ NP = 7\), got 7"),
        ("index_map", (0, 2, 2), -1, r"index_map in .*, got -1"),
        ("roi", 1, 1, r"roi in \[0, R = 1\), got 1"),
        ("roi", 1, -1, "roi in .*, got -1"),
        ("xy", (2, 0), 3, r"xy\[:, 0\] in \[0, W = 3\), got 3"),
        ("xy", (2, 1), -2, r"xy\[:, 1\] in \[0, H = 3\), got -2"),
        ("xy", (2, 1), 2, r"index_map\[0, 2, 0\] = 2, .* got 4"),
        ("index_map", (0, 0, 0), 5, r"index_map\[0, 0, 0\] = 0, .* got 5"),
        ("index_map", (0, 2, 0), 3, "an active id in one cell of index_map, got 3 in 2"),
    ],
)
def test_validate_values(field, position, number, message):
    sps = toy_sps()
    getattr(sps, field)[position] = number
    with pytest.raises(ValueError, match=f"^SPS: expected {message}$"):
        sps.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": None}, "active to be a Tensor, got NoneType"),
        ({"active": torch.zeros(4)}, r"active of shape \[NA, F\], got \[4\]"),
        ({"active": torch.zeros(4, 1, dtype=torch.int32)}, "active of a floating-point dtype, got int32"),
        ({"passive": torch.zeros(3, 2).double()}, r"passive of shape \[NP=3, F=1\], got \[3, 2\]"),
        ({"passive": torch.zeros(3, 1)}, "passive of dtype float64, got float32"),
        ({"passive": torch.zeros(3, 1, device="meta").double()}, r"passive on the device of active \(cpu\)"),
        ({"index_map": torch.zeros(3, 3)}, r"index_map of shape \[R, H, W\], got \[3, 3\]"),
        ({"index_map": torch.zeros(1, 3, 3)}, "index_map of dtype int32 or int64, got float32"),
        ({"roi": torch.zeros(3).int()}, r"roi of shape \[NA=4\], got \[3\]"),
        ({"roi": torch.zeros(4).long()}, "roi of dtype int32, got int64"),
        ({"xy": torch.zeros(4, 3).int()}, r"xy of shape \[NA=4, XY=2\], got \[4, 3\]"),
        ({"xy": torch.zeros(4, 2).long()}, "xy of dtype int32, got int64"),
    ],
)
def test_validate_tensors(change, message):
    with pytest.raises(ValueError, match=f"^SPS: expected {message}"):
        replace(toy_sps(), **change).validate()


def test_validate_returns_the_sps():
    """A passive row without a cell is legal."""
    sps = toy_sps()
    assert sps.validate() is sps
    spare = replace(sps, passive=torch.cat([sps.passive, sps.passive]))
    assert spare.validate() is spare


def test_repr():
    sps = toy_sps()
    sizes = "SPS(active=4, passive=3, features=1, maps=1, height=3, width=3"
    assert repr(sps) == f"{sizes}, dtype=float64, device=cpu)"
    assert repr(sps.to("meta", torch.bfloat16)) == f"{sizes}, dtype=bfloat16, device=meta)"
    names = torch.utils._pytree.tree_map(lambda part: part.dim(), sps)
    assert repr(names) == "SPS(active=2, passive=2, index_map=3, roi=1, xy=2)"
    assert repr(replace(sps, roi=torch.zeros(4, 1))).count("roi=Tensor[4, 1]") == 1


def test_to():
    sps = toy_sps()
    for moved, device in (
        (sps.to(torch.float16), "cpu"),
        (sps.to("meta", torch.float16), "meta"),
        (sps.to(torch.device("meta"), dtype=torch.float16, non_blocking=True), "meta"),
        (sps.to(torch.zeros(1, dtype=torch.float16, device="meta")), "meta"),
    ):
        assert [part.dtype for part in parts(moved)] == [torch.float16] * 2 + [torch.int32] * 3
        assert {part.device.type for part in parts(moved)} == {device}
    same, copied = sps.to("cpu"), sps.to("cpu", copy=True)
    for part, shared, copy in zip(parts(sps), parts(same), parts(copied), strict=True):
        assert shared.data_ptr() == part.data_ptr()
        assert copy.data_ptr() != part.data_ptr()
        assert torch.equal(copy, part)
    with pytest.raises(TypeError, match="SPS.to: expected a floating-point dtype, got int64"):
        sps.to(torch.int64)


def test_save_and_load(tmp_path):
    """Without permission to run code from the file."""
    torch.save(toy_sps(), tmp_path / "sps.pt")
    loaded = torch.load(tmp_path / "sps.pt", weights_only=True).validate()
    assert all(torch.equal(old, new) for old, new in zip(parts(toy_sps()), parts(loaded), strict=True))


def test_pytree():
    sps = toy_sps()
    leaves, spec = torch.utils._pytree.tree_flatten({"sps": sps, "rest": 1})
    assert [leaf is part for leaf, part in zip(leaves, parts(sps), strict=False)] == [True] * 5
    again = torch.utils._pytree.tree_unflatten(leaves, spec)["sps"]
    assert isinstance(again, effops.SPS)
    assert all(old is new for old, new in zip(parts(sps), parts(again), strict=True))


# ------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("field", "position", "number"),
    [
        ("index_map", (0, 1, 1), 7),
        ("index_map", (0, 1, 1), -1),
        ("index_map", (0, 1, 1), -(2**31)),
        ("roi", 3, 1),
        ("roi", 3, -1),
        ("xy", (3, 0), 3),
        ("xy", (3, 1), -1),
        ("xy", (3, 0), 2**31 - 1),
    ],
)
def test_values_out_of_range(sps_conv2d, sps_to_dense, sps_refine, field, position, number):
    """Of what an op reads."""
    sps = toy_sps()
    getattr(sps, field)[position] = number
    with pytest.raises(ValueError, match=f"^sps_conv2d: expected {field}"):
        sps_conv2d(*parts(sps), torch.ones(1, 1, 3, 3, dtype=torch.float64))
    if field == "index_map":
        with pytest.raises(ValueError, match="^sps_to_dense: expected index_map"):
            sps_to_dense(sps)
        with pytest.raises(ValueError, match="^sps_refine: expected index_map"):
            sps_refine(sps, torch.zeros(4), 4)


def test_wrong_arguments(sps_from_dense, sps_refine):
    sps = toy_sps()
    with pytest.raises(TypeError, match="^sps_from_dense: expected mask"):
        sps_from_dense(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(TypeError, match="^sps_refine: expected scores"):
        sps_refine(sps, torch.zeros(4).long(), 2)
    with pytest.raises(ValueError, match="^sps_refine: expected num_refine"):
        sps_refine(sps, torch.zeros(4), -1)
