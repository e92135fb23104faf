"""Forward agrees with the definition computed in float64; outputs have the promised form."""

from helpers import assert_bit_equal, has_promised_layout

from effops.testing import check_forward
from effops.testing._check import forward, tensors_of


def test_forward_agrees_with_reference(info, sample):
    check_forward(info, sample)


def test_output_has_the_references_dtype_and_shape(info, sample):
    expected = tensors_of(info.computed(info.reference(*sample.args, **sample.kwargs)))
    for actual, wanted in zip(forward(info, sample), expected, strict=True):
        assert (actual.dtype, actual.shape, actual.device) == (wanted.dtype, wanted.shape, wanted.device)
        assert has_promised_layout(info, sample, actual)
        assert not actual.requires_grad


def test_torch_op_computes_the_same(info, sample):
    outputs = tensors_of(info.native_computed(info.torch_op(*info.native(sample))))
    for actual, wanted in zip(outputs, forward(info, sample), strict=True):
        if info.native_is_narrow:
            actual = actual.to(wanted.dtype).reshape(wanted.shape)
        assert_bit_equal(actual, wanted)


def test_arguments_can_be_keywords(info, device):
    sample = info.build_sample(info.typical, device)
    names = [argument.name for argument in info.torch_op._schema.arguments]
    by_name = info.torch_op(**dict(zip(names, info.native(sample), strict=True)))
    outputs = tensors_of(info.native_computed(by_name))
    for actual, wanted in zip(outputs, forward(info, sample), strict=True):
        assert_bit_equal(actual, wanted)
