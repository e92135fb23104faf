"""Loads the native libraries, once, when effops is imported.

The libraries are looked for beside ``effops._C``, which in an editable installation is not beside this
file. The CUDA library is loaded when torch was built with CUDA, whether or not a GPU is there; why it is
missing is kept and told when a CUDA tensor arrives.
"""

import os
from pathlib import Path

import torch

_CAPABILITIES = ("default", "avx2", "avx512")
_OLDEST_TORCH = (2, 10)  # TORCH_TARGET_VERSION in CMakeLists.txt

try:
    from effops import _C
except ImportError as error:
    raise ImportError(
        "effops: the compiled module effops._C is missing or cannot be loaded. In a source checkout run "
        "`make install` or `pip install --no-build-isolation -e .`; elsewhere `pip install effops`. "
        f"The loader said: {error}"
    ) from error


def _check_environment() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ImportError(f"effops: expected torch >= {oldest}, got torch {torch.__version__}")
    capability = os.environ.get("EFFOPS_CPU_CAPABILITY")
    if capability is not None and capability not in _CAPABILITIES:
        raise ValueError(
            f"effops: expected the environment variable EFFOPS_CPU_CAPABILITY to be one of "
            f"{', '.join(_CAPABILITIES)}, got {capability!r}"
        )


def _load_cuda(path: Path) -> str | None:
    """Loads the CUDA library; returns why it is not there, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    if not path.exists():
        return (
            "effops was built without CUDA; install a wheel that has it, or build effops where nvcc is "
            "found (EFFOPS_CUDA=on makes a missing nvcc an error)"
        )
    try:
        _C.load_cuda(str(path))
    except RuntimeError as error:
        return f"libeffops_cuda.so did not load: {error}"
    return None


_check_environment()
library_dir: Path = Path(_C.__file__).resolve().parent
_C.load_cpu(str(library_dir / "libeffops_cpu.so"))
#: Why CUDA tensors are not supported here, or None when they are.
cuda_missing_reason: str | None = _load_cuda(library_dir / "libeffops_cuda.so")


def build_info() -> dict[str, str]:
    """How the native libraries were built.

    Returns a dict of text: ``version``, ``compiler``, ``torch_target`` (oldest torch they run with),
    ``isa_variants`` (CPU instruction sets, space-separated), ``cuda_compiler`` and ``cuda_architectures``
    (empty when built without CUDA).
    """
    return dict(_C.build_info())


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: ``"default"``, ``"avx2"`` or ``"avx512"``.

    It is the best that the processor has, capped by the environment variable ``EFFOPS_CPU_CAPABILITY``
    (read once, at import).
    """
    return str(_C.cpu_capability())
