"""torch.utils.flop_counter counts the ops."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from effops.testing._check import forward, gradients


def counted(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_flop_counts()["Global"]


def test_forward(info, device):
    """The golden count of the smallest sample, and nothing else counted."""
    sample = info.build_sample(info.smallest, device)
    assert info.flops[0] > 0
    assert counted(forward, info, sample) == {info.torch_op.overloadpacket: info.flops[0]}


@pytest.mark.ops("differentiable")
def test_backward(info, device):
    sample = info.build_sample(info.smallest, device)
    counts = counted(gradients, info, sample)
    assert counts[info.torch_op.overloadpacket] == info.flops[0]
    assert counts[info.backward_op.overloadpacket] == info.flops[1] > info.flops[0]


@pytest.mark.ops("has_fixed_shapes")
def test_count_needs_no_kernel(info):
    """On the meta device, where models are counted before they are built."""
    sample = info.build_sample(info.smallest).map(lambda tensor: tensor.to("meta"))
    assert sum(counted(forward, info, sample).values()) == info.flops[0]
