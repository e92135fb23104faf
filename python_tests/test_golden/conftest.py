"""Every golden test runs on the definition (`effops.reference`) and on the native op (`effops.ops`).

A test takes the ops that it calls as fixtures, by their names.
"""

import pytest

import effops.ops
import effops.reference


@pytest.fixture(params=["reference", "op"])
def implementation(request):
    """Looks an op up by name, in the reference or among the native ops."""
    module = effops.reference if request.param == "reference" else effops.ops

    return lambda name: getattr(module, name)


def _fixture_of(name):
    @pytest.fixture(name=name)
    def op(implementation):
        return implementation(name)

    return op


globals().update({f"{name}_op": _fixture_of(name) for name in effops.ops.__all__})
