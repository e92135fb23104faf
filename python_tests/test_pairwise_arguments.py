"""Forms of the arguments of the pairwise ops that the samples of the database do not have."""

import math

import pytest
import torch
from helpers import assert_bit_equal

import effops
from effops import reference
from effops.testing import assert_close

DOUBLE = torch.float64
shift, shift_backward = torch.ops.effops.mean_shift.default, torch.ops.effops.mean_shift_backward.default
loss_op = torch.ops.effops.pairwise_embedding_loss.default


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)


def gradients(output, inputs):
    return torch.autograd.grad(output, inputs, normal(*output.shape, seed=9, dtype=output.dtype))


# ------------------------------------------------------------------------------------ kappa


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("points", [torch.float32, torch.float64, torch.bfloat16])
def test_kappa_of_any_shape_and_dtype(shape, dtype, points):
    """Cast, with its gradient in its own dtype and shape; a number gives the same result."""
    x = normal(2, 9, 3).to(points)
    kappa = torch.full(shape, 6.0, dtype=dtype, requires_grad=True)
    output = effops.mean_shift(x, kappa, iterations=2)
    assert_bit_equal(output.detach(), effops.mean_shift(x, 6, iterations=2))
    (found,) = gradients(output, kappa)
    assert (found.dtype, found.shape) == (dtype, shape)
    exact = torch.full(shape, 6.0, dtype=DOUBLE, requires_grad=True)
    wanted = reference.mean_shift(x.double(), exact, iterations=2)
    (expected,) = torch.autograd.grad(wanted, exact, normal(2, 9, 3, seed=9, dtype=points).double())
    assert_close(found, expected, 1e-4 if dtype.itemsize >= 4 else 1e-2)


def test_kappa_without_other_gradients():
    x, kappa = normal(2, 9, 3, dtype=DOUBLE), torch.tensor(5.0, dtype=DOUBLE, requires_grad=True)
    seeds = normal(2, 4, 3, seed=1, dtype=DOUBLE)
    for given in (None, seeds):
        assert torch.autograd.gradcheck(
            lambda k, given=given: effops.mean_shift(x, k, iterations=3, seeds=given), kappa
        )


# ------------------------------------------------------------------------------------ settings


def test_precisions_are_one_on_the_cpu():
    x = normal(2, 30, 5)
    assert_bit_equal(effops.mean_shift(x, precision="medium"), effops.mean_shift(x, precision="high"))


def test_weights_in_float32_beside_half_precision():
    """As autocast leaves them: computed from what they are, not from what they would be rounded to."""
    x, weights = normal(2, 9, 3).bfloat16(), normal(2, 9, seed=1).abs().requires_grad_()
    labels = torch.arange(18).view(2, 9) % 3
    found = effops.mean_shift(x, 8.0, iterations=2, weights=weights)
    exact = effops.mean_shift(x.float(), 8.0, iterations=2, weights=weights)
    assert_bit_equal(found, exact.bfloat16())
    value = effops.pairwise_embedding_loss(x, labels, weights=weights)
    assert_bit_equal(value, effops.pairwise_embedding_loss(x.float(), labels, weights=weights))
    assert all(g.dtype == torch.float32 for output in (found, value) for g in gradients(output, [weights]))


def test_tol_stops_each_image_by_itself():
    """Later iterates repeat the last one, and gradients pass through the iterations that were done."""
    still = torch.eye(3, dtype=DOUBLE).repeat(3, 1)
    x = torch.stack([still, normal(9, 3, dtype=DOUBLE)]).requires_grad_()
    everything = effops.mean_shift(x, 30.0, iterations=8, return_all=True, tol=1e-3)
    for image in range(2):
        alone = effops.mean_shift(x[image], 30.0, iterations=8, return_all=True, tol=1e-3)
        assert_bit_equal(everything[:, image].detach(), alone.detach())
    assert torch.equal(everything[1, 0], everything[8, 0])
    assert not torch.equal(everything[1, 1], everything[2, 1])
    *_, steps = shift(x.detach(), None, None, None, 30.0, 1.0, 8, 1e-3, 0, False, False)
    assert steps[0] == 1
    assert steps[0] < steps[1] <= 8
    last = effops.mean_shift(x, 30.0, iterations=8, tol=1e-3)
    (found,) = gradients(last, x)
    expected = torch.stack(
        [
            gradients_of_image(x, image, int(steps[image]), normal(2, 9, 3, seed=9, dtype=DOUBLE))
            for image in range(2)
        ]
    )
    assert_close(found, expected, 1e-11)


def gradients_of_image(x, image, iterations, incoming):
    rows = x[image].detach().requires_grad_()
    output = effops.mean_shift(rows, 30.0, iterations=iterations)
    return torch.autograd.grad(output, rows, incoming[image])[0]


def test_labels_may_be_any_numbers():
    x, labels = normal(2, 12, 3), torch.arange(24).view(2, 12) % 4 - 1
    expected = effops.pairwise_embedding_loss(x, labels)
    for change in (lambda n: n * 10**15 - (n < 0).long(), lambda n: torch.where(n < 0, n - 3, 5 - n)):
        assert_close(effops.pairwise_embedding_loss(x, change(labels)), expected, 1e-6)


# ------------------------------------------------------------------------------------ vmap and autocast


@pytest.mark.parametrize("return_all", [False, True])
def test_vmap_over_points_and_seeds(return_all):
    """Forward and backward, each tensor batched or shared, as a loop."""
    x, weights = normal(3, 2, 9, 4, dtype=DOUBLE), normal(3, 2, 9, seed=1, dtype=DOUBLE).abs()
    seeds = normal(3, 2, 5, 4, seed=2, dtype=DOUBLE)
    for batched in ((True, True, True), (False, False, True), (True, False, False), (False, True, False)):
        leaves = [
            (t if is_batched else t[0]).clone().requires_grad_()
            for t, is_batched in zip((x, weights, seeds), batched, strict=True)
        ]

        def call(x, weights, seeds):
            return effops.mean_shift(x, 7.0, 0.8, 2, weights, return_all, seeds=seeds)

        in_dims = tuple(0 if is_batched else None for is_batched in batched)
        found = torch.vmap(call, in_dims)(*leaves)
        members = [
            [leaf[k] if is_batched else leaf for leaf, is_batched in zip(leaves, batched, strict=True)]
            for k in range(3)
        ]
        expected = torch.stack([call(*member) for member in members])
        assert_close(found.detach(), expected.detach(), 1e-13)
        for actual, wanted in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
            assert_close(actual, wanted, 1e-12)


def test_vmap_over_single_sets():
    """Each member is a set without a batch."""
    x, labels = normal(3, 9, 4), torch.arange(27).view(3, 9) % 4
    assert_close(torch.vmap(effops.mean_shift)(x), effops.mean_shift(x), 1e-6)
    assert torch.equal(torch.vmap(effops.mean_shift_cluster)(x), effops.mean_shift_cluster(x))
    losses = torch.vmap(effops.pairwise_embedding_loss)(x, labels)
    assert_close(losses.mean(), effops.pairwise_embedding_loss(x, labels), 1e-6)


def test_half_precision_on_the_meta_device():
    """Which has no autocast to ask."""
    x = torch.empty(2, 9, 4, dtype=torch.bfloat16, device="meta")
    assert effops.mean_shift(x).dtype == torch.bfloat16
    assert effops.mean_shift_cluster(x).shape == (2, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_seeds_under_autocast(dtype):
    x, seeds, kappa = normal(2, 9, 4), normal(2, 5, 4, seed=1).to(dtype), torch.tensor(5.3)
    with torch.autocast("cpu", dtype):
        found = effops.mean_shift(x.to(dtype), kappa, seeds=seeds)
        through_torch = shift(x.to(dtype), None, seeds, kappa, 0.0, 1.0, 10, -1.0, 0, False, False)[0]
    expected = effops.mean_shift(x.to(dtype).float(), kappa, seeds=seeds.float())
    assert_bit_equal(found, expected)
    assert_bit_equal(through_torch, expected)


# ------------------------------------------------------------------------------------ torch.ops


def test_what_backward_needs_is_kept_on_demand():
    """save=True by the caller, or by autograd where a gradient is needed."""
    x = normal(2, 9, 3)
    settings = (None, None, None, 6.0, 1.0, 3, -1.0, 0)
    output, iterates, sums, steps = shift(x, *settings, False, False)
    assert [t.shape for t in (output, iterates, sums)] == [(2, 9, 3), (0,), (0,)]
    assert steps.tolist() == [3, 3]
    kept = shift(x, *settings, False, True)
    assert [t.shape for t in kept[:3]] == [(2, 9, 3), (4, 2, 9, 3), (3, 2, 2, 9)]
    assert_bit_equal(kept[1][-1], output)
    every = shift(x, *settings, True, True)
    assert [t.shape for t in every[:3]] == [(4, 2, 9, 3), (0,), (3, 2, 2, 9)]
    assert_bit_equal(every[0], kept[1])
    needy = x.clone().requires_grad_()
    found = shift(needy, *settings, False, False)
    assert [t.requires_grad for t in found] == [True, False, False, False]
    assert_bit_equal(found[1], kept[1])
    public = effops.mean_shift(needy, 6.0, iterations=3)
    assert_bit_equal(gradients(found[0], needy)[0], gradients(public, needy)[0])


@pytest.mark.compile
def test_exported_programs_can_be_trained():
    """The graph is traced without gradients, and asks for nothing to be kept."""

    class Model(torch.nn.Module):
        def forward(self, x, labels):
            return effops.pairwise_embedding_loss(effops.mean_shift(x, 6.0, iterations=2), labels)

    x, labels = normal(2, 9, 3), torch.arange(18).view(2, 9) % 3
    with torch.no_grad():
        program = torch.export.export(Model(), (x, labels))
    x.requires_grad_()
    found, expected = program.module()(x, labels), Model()(x, labels)
    assert_bit_equal(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda order, segments: (order + 1, segments), "order"),
        (lambda order, segments: (order - 1, segments), "order"),
        (lambda order, segments: (order, segments.flip(1)), "segments"),
        (lambda order, segments: (order, segments - 1), "segments"),
        (lambda order, segments: (order, segments + 20), "segments"),
    ],
    ids=["order_too_high", "order_negative", "falling", "below_minus_one", "too_many"],
)
def test_sorted_labels_are_checked_on_the_cpu(change, message):
    x, weights = normal(1, 9, 3), torch.ones(1, 9)
    order = torch.arange(9)[None]
    segments = torch.tensor([[-1, 0, 0, 0, 1, 1, 2, 2, 2]])
    loss_op(x, order, segments, weights, 0.5, 0)
    with pytest.raises(RuntimeError, match=rf"pairwise_embedding_loss: expected {message}"):
        loss_op(x, *change(order, segments), weights, 0.5, 0)


def test_cluster_leaves_no_graph():
    x = normal(2, 20, 3).requires_grad_()
    labels = torch.ops.effops.mean_shift_cluster(x, 20.0, 3, 0.9, 1)
    assert not labels.requires_grad
    assert torch.equal(labels, effops.mean_shift_cluster(x, 20.0, 3))
    for wrong in ((-1.0, 3, 0.9, 1), (20.0, -1, 0.9, 1), (20.0, 3, math.nan, 1), (20.0, 3, 0.9, 0)):
        with pytest.raises(RuntimeError, match=r"mean_shift_cluster: expected (kappa|iter|thresh|min_size)"):
            torch.ops.effops.mean_shift_cluster(x, *wrong)
