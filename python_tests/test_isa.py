"""Every instruction set that the CPU kernels are built for, each in a process of its own."""

import platform
from pathlib import Path

import pytest
from helpers import assert_ran, run_python

import effops

FLAGS = {
    "default": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
VARIANTS = effops.build_info()["isa_variants"].split()
COMPARE = """
import effops, torch
from effops.testing import OP_DB, check_all
torch.set_num_threads(1)
assert effops.cpu_capability() == {variant!r}, effops.cpu_capability()
for info in OP_DB if {all_samples} else ():
    assert check_all(info) >= len(info.dtypes) * 20, info.name
"""


def processor_flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def test_all_variants_are_built():
    expected = set(FLAGS) if platform.machine() in ("x86_64", "AMD64") else {"default"}
    assert set(VARIANTS) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_reference(variant):
    """The variant of this process need only be the one that was asked for: the other tests run it."""
    missing = FLAGS[variant] - processor_flags()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    code = COMPARE.format(variant=variant, all_samples=variant != effops.cpu_capability())
    assert_ran(run_python(code, EFFOPS_CPU_CAPABILITY=variant))


@pytest.mark.parametrize("value", ["sse", "AVX2", "", "avx512 "])
def test_unknown_value_of_the_variable(value):
    process = run_python("import effops", EFFOPS_CPU_CAPABILITY=value)
    assert process.returncode == 1
    assert (
        f"ValueError: effops: expected the environment variable EFFOPS_CPU_CAPABILITY to be one of "
        f"default, avx2, avx512, got {value!r}" in process.stderr
    )
