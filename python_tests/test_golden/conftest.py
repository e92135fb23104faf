"""Every golden test runs on the definition (`effops.reference`) and on the native op (`effops.ops`)."""

import pytest

import effops.ops
import effops.reference


@pytest.fixture(params=["reference", "op"])
def implementation(request):
    """Looks an op up by name, in the reference or among the native ops."""
    module = effops.reference if request.param == "reference" else effops.ops

    return lambda name: getattr(module, name)


@pytest.fixture
def ms_deform_attn(implementation):
    return implementation("ms_deform_attn")


@pytest.fixture
def point_sample(implementation):
    return implementation("point_sample")


@pytest.fixture
def roi_align(implementation):
    return implementation("roi_align")


@pytest.fixture
def pack_bits(implementation):
    return implementation("pack_bits")


@pytest.fixture
def unpack_bits(implementation):
    return implementation("unpack_bits")


@pytest.fixture
def topk_pack(implementation):
    return implementation("topk_pack")


@pytest.fixture
def binnorm(implementation):
    return implementation("binnorm")


@pytest.fixture
def hamming_distance(implementation):
    return implementation("hamming_distance")


@pytest.fixture
def hamming_knn(implementation):
    return implementation("hamming_knn")


@pytest.fixture
def hamming_match(implementation):
    return implementation("hamming_match")
