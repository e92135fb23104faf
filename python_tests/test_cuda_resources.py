"""Registers and spills of every CUDA kernel, as ptxas reported them, against the stored table.

The build keeps ptxas' words beside each object (cmake/ptxas_report.py). After a wanted change:
``python python_tests/test_cuda_resources.py`` rewrites the table from the newest build.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("cuda_resources.json")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def reports() -> list[Path]:
    """The reports of the newest build folder that has any."""
    folders = {path.relative_to(ROOT / ".build").parts[0] for path in (ROOT / ".build").rglob("*.ptxas")}
    newest = max(
        folders,
        key=lambda name: max(path.stat().st_mtime for path in (ROOT / ".build" / name).rglob("*.ptxas")),
        default=None,
    )
    return [] if newest is None else sorted((ROOT / ".build" / newest).rglob("*.ptxas"))


def resources() -> dict[str, dict[str, int]]:
    """{"<architecture> <kernel>": {"registers": ..., "stack": ..., "spills": ...}}"""
    found = {}
    for path in reports():
        for entry in _ENTRY.finditer(path.read_text()):
            found[f"{entry['arch']} {entry['name']}"] = {
                "registers": int(entry["registers"]),
                "stack": int(entry["stack"]),
                "spills": int(entry["stores"]) + int(entry["loads"]),
            }
    names = subprocess.run(
        ["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {
        name.split("(effops")[0].replace(" void ", " "): found[key]
        for name, key in zip(names, found, strict=True)
    }


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, int]]:
    found = resources()
    if not found:
        pytest.skip("this checkout holds no CUDA build (nvcc missing or EFFOPS_CUDA=off)")
    return found


def test_no_kernel_spills(built: dict[str, dict[str, int]]) -> None:
    assert {name: entry for name, entry in built.items() if entry["spills"] or entry["stack"]} == {}


def test_registers_do_not_grow(built: dict[str, dict[str, int]]) -> None:
    stored: dict[str, int] = json.loads(TABLE.read_text())
    architectures = {name.split()[0] for name in stored}
    built = {name: entry for name, entry in built.items() if name.split()[0] in architectures}
    unknown = sorted(set(built) - set(stored))
    assert not unknown, f"kernels that are not in {TABLE.name}: {unknown}"
    grown = {
        name: (stored[name], entry["registers"])
        for name, entry in built.items()
        if entry["registers"] > stored[name]
    }
    assert grown == {}


if __name__ == "__main__":
    table = {name: entry["registers"] for name, entry in sorted(resources().items())}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{TABLE.name}: {len(table)} kernels")
