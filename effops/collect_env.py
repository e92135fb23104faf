"""What a bug report needs: versions, processor, instruction sets, CUDA, threads, environment variables.

``python -m effops collect-env`` prints it; torch is all it needs. Names of machines, users and folders are
left out.
"""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from effops import _load
from effops._version import __version__

#: Environment variables that change what effops or torch does.
VARIABLES = (
    "EFFOPS_CPU_CAPABILITY",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
)
_PACKAGES = (
    "numpy",
    "rich",
    "typer",
    "matplotlib",
    "scikit-image",
    "opencv-python-headless",
    "faiss-cpu",
    "pytest",
    "pytest-benchmark",
)
_AMD_CORES = {  # family: (first model, name), the last first model that is not above the model counts
    23: ((0x00, "Zen"), (0x08, "Zen+"), (0x10, "Zen"), (0x30, "Zen 2")),
    25: ((0x00, "Zen 3"), (0x10, "Zen 4"), (0x20, "Zen 3"), (0x60, "Zen 4")),
    26: ((0x00, "Zen 5"),),
}
_INTEL_CORES = {
    0x4F: "Broadwell",
    0x55: "Skylake or Cascade Lake",
    0x6A: "Ice Lake",
    0x8F: "Sapphire Rapids",
    0xAD: "Granite Rapids",
    0xCF: "Emerald Rapids",
}


def cpu_name() -> str:
    """Processor and microarchitecture, such as ``"AMD EPYC (Zen 4)"``."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in fields.items()}
    name = info.get("model name", platform.machine())
    core = _microarchitecture(info)
    return f"{name} ({core})" if core else name


def _microarchitecture(info: dict[str, str]) -> str | None:
    family, model = info.get("cpu family", ""), info.get("model", "")
    if not (family.isdigit() and model.isdigit()):
        return None
    if info.get("vendor_id") == "AuthenticAMD":
        names = [name for first, name in _AMD_CORES.get(int(family), ()) if int(model) >= first]
        return names[-1] if names else None
    return _INTEL_CORES.get(int(model)) if family == "6" else None


def cpu_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: str = "cpu") -> str:
    """One line for tables of times, such as ``"AMD EPYC (Zen 4), 2 cores, torch 2.13.0"``."""
    version = torch.__version__.split("+")[0]
    if device == "cpu":
        cores = cpu_cores()
        return f"{cpu_name()}, {cores} core{'s' if cores != 1 else ''}, torch {version}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {version}"


def collect() -> dict[str, dict[str, str]]:
    """Titles, and under each the facts and their values, as text."""
    return {
        "effops": _effops(),
        "CUDA": _cuda(),
        "torch": {
            "version": torch.__version__,
            "CUDA version": torch.version.cuda or "built without CUDA",
            "threads": str(torch.get_num_threads()),
            "CPU capability": torch.backends.cpu.get_cpu_capability(),
        },
        "system": {
            "Python": f"{platform.python_implementation()} {platform.python_version()}",
            "OS": _system(),
            "processor": cpu_name(),
            "cores": str(cpu_cores()),
        },
        "packages": _packages(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def report() -> str:
    """The same as text, one fact a line."""
    lines = []
    for title, facts in collect().items():
        lines.append(title)
        width = max(map(len, facts), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in facts.items()] or ["  none set"]
    return "\n".join(lines)


def _effops() -> dict[str, str]:
    info = _load.build_info()
    return {
        "version": __version__,
        "compiler": info["compiler"],
        "oldest torch": info["torch_target"],
        "instruction sets built": info["isa_variants"],
        "instruction set used": _load.cpu_capability(),
    }


def _cuda() -> dict[str, str]:
    info = _load.build_info()
    reason = _load.cuda_missing_reason
    facts = {
        "library": "loaded" if reason is None else "not loaded",
        "compiler": info["cuda_compiler"] or "built without CUDA",
        "architectures": info["cuda_architectures"] or "none",
    }
    if reason is not None:
        facts["reason"] = reason.replace(f"{_load.library_dir}{os.sep}", "")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for index in devices:
        major, minor = torch.cuda.get_device_capability(index)
        facts[f"device {index}"] = f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    return facts


def _system() -> str:
    if hasattr(platform, "freedesktop_os_release"):
        try:
            name = platform.freedesktop_os_release()["PRETTY_NAME"]
            return f"{name}, {platform.system()} {platform.release()}, {platform.machine()}"
        except (OSError, KeyError):
            pass
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def _packages() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def main() -> None:
    """Prints the report."""
    sys.stdout.write(report() + "\n")


if __name__ == "__main__":
    main()
