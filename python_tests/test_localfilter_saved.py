"""What backward ops of the per-pixel filters get beside the inputs: saved results, right and wrong ones."""

import pytest
import torch

import effops  # noqa: F401  registers the ops
from effops.testing import LAYOUTS
from effops.testing._layouts import STRIDE_ZERO

SETTINGS = ("normalize", "padding_mode", "stride", "upsample", "dilation", "groups")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filter_flow(padding=0, normalize=0):
    image, filters, settings = (
        normal(2, 4, 5, 6),
        normal(2, 18, 5, 6, seed=1),
        (normalize, padding, 1, 1, 2, 2),
    )
    output, flow, normalizer = torch.ops.effops.filter_flow(image, filters, *settings, True)
    grads = (normal(*output.shape, seed=2), normal(*flow.shape, seed=3))
    saved = {"output": output, "flow": flow, "normalizer": normalizer}
    return torch.ops.effops.filter_flow_backward, {
        "grad_output": grads[0],
        "grad_flow": grads[1],
        "image": image,
        "filters": filters,
        **saved,
        **dict(zip(SETTINGS, settings, strict=True)),
        "need_image": True,
        "need_filters": True,
    }


def expected_flow():
    filters = normal(2, 18, 5, 6)
    flow, normalizer = torch.ops.effops.expected_flow(filters, 0, 1, 2)
    arguments = {"grad_flow": normal(*flow.shape, seed=1), "filters": filters, "flow": flow}
    settings = {"normalizer": normalizer, "normalize": 0, "dilation": 1, "groups": 2}
    return torch.ops.effops.expected_flow_backward, {**arguments, **settings}


def local_attention():
    q, k, v = normal(2, 4, 5, 6), normal(2, 4, 5, 6, seed=1), normal(2, 3, 5, 6, seed=2)
    settings = {"window": 3, "dilation": 1, "scale": 0.5, "border": 3}
    output, log_sum_exp = torch.ops.effops.local_attention(q, k, v, *settings.values())
    saved = {"output": output, "log_sum_exp": log_sum_exp}
    needs = {"need_q": True, "need_k": True, "need_v": True}
    arguments = {"grad_output": normal(*output.shape, seed=3), "q": q, "k": k, "v": v}
    return torch.ops.effops.local_attention_backward, {**arguments, **saved, **settings, **needs}


CASES = {
    "filter_flow": (filter_flow, ("grad_output", "grad_flow", "output", "flow", "normalizer")),
    "expected_flow": (expected_flow, ("grad_flow", "flow", "normalizer")),
    "local_attention": (local_attention, ("grad_output", "output", "log_sum_exp")),
}
PAIRS = [(make, name) for make, names in CASES.values() for name in names]
each_saved = pytest.mark.parametrize(
    ("make", "name"), PAIRS, ids=lambda value: getattr(value, "__name__", value)
)


@each_saved
def test_wrong_ones_are_refused(make, name):
    backward, arguments = make()
    good = arguments[name]
    wrong = [good[0], good[None], good[:1], good[:, :-1], good[..., 1:], good.mT, good[:0], good.new_empty(0)]
    for tensor in (*wrong, good.double(), good.half(), good.long()):
        with pytest.raises(RuntimeError, match=rf"_backward: expected {name} of "):
            backward(**{**arguments, name: tensor})


@each_saved
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in STRIDE_ZERO])
def test_any_strides(make, name, layout):
    backward, arguments = make()
    wanted = backward(**arguments)
    found = backward(**{**arguments, name: LAYOUTS[layout](arguments[name])})
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for actual, expected in pairs:
        assert torch.equal(actual, expected)


def test_flow_and_its_gradient_come_together():
    backward, arguments = filter_flow()
    for name in ("flow", "grad_flow"):
        with pytest.raises(RuntimeError, match="filter_flow_backward: expected grad_flow and flow or none"):
            backward(**{**arguments, name: None})


@pytest.mark.parametrize(("normalize", "padding"), [(1, 0), (1, 1), (1, 3), (0, 3)])
def test_the_normalizer_is_saved_where_needed(normalize, padding):
    backward, arguments = filter_flow(padding, normalize)
    is_saved = (normalize, padding) not in [(1, 0), (1, 1)]
    assert arguments["normalizer"].shape == ((2, 2, 5, 6) if is_saved else (0,))
    other = torch.empty(0) if is_saved else torch.ones(2, 2, 5, 6)
    with pytest.raises(RuntimeError, match="filter_flow_backward: expected normalizer of shape"):
        backward(**{**arguments, "normalizer": other})
