"""Runs the benchmarks and turns their JSON into a table and a plot.

python bench/report.py run [pytest arguments]       results go to bench/results/
python bench/report.py show FILE [--markdown] [--plot PNG]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_COLUMNS = (
    "case",
    "dtype",
    "direction",
    "effops",
    "strongest peer",
    "ratio",
    "other ratios",
    "points/s",
    "roofline",
    "notes",
)
# numbers of single benchmarks, by their name in the JSON
_NOTES = {
    "times_one_search": "{} x one search",
    "rate_of_mm": "{} x the rate of mm",
    "three_dilations_over_one": "{} x one dilation",
    "rate_of_read": "{} x the rate of reading",
    "rate_of_copy": "{} x the rate of copying",
    "share_of_new_memory": "filling new memory like the filters takes {} of it",
    "float32_over_bfloat16": "float32 takes {} x as long",
    "extra_memory": "extra memory / filters: {}",
    "extra_megabytes": "extra MB: {}",
    "percent_of_memory": "{} % of the extra memory of N x N",
    "times_forward": "{} x forward",
}


def main() -> int:
    if sys.argv[1:2] == ["run"]:
        return run(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run the benchmarks; arguments go to pytest")
    show_parser = commands.add_parser("show", help="print a table")
    show_parser.add_argument("file", type=Path)
    show_parser.add_argument("--markdown", action="store_true")
    show_parser.add_argument("--plot", type=Path, help="write a bar chart of the ratios")
    arguments = parser.parse_args()
    show(arguments.file, arguments.markdown, arguments.plot)
    return 0


def run(pytest_arguments: list[str]) -> int:
    """Runs pytest on this folder, or on the files named, and shows the results."""
    from effops import collect_env

    wants_cuda = not any(text in ("--device=cpu", "cpu") for text in pytest_arguments)
    hardware = collect_env.hardware("cuda" if wants_cuda and _has_cuda() else "cpu")
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    file = _HERE / "results" / f"{datetime.date.today().isoformat()}-{slug}.json"
    file.parent.mkdir(exist_ok=True)
    named = [text for text in pytest_arguments if Path(text.split("::")[0]).exists()]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "-c", str(_HERE.parent / "pyproject.toml"), f"--rootdir={_HERE.parent}",
        "-o", "python_files=bench_*.py", "--benchmark-only", "--benchmark-quiet",
        f"--benchmark-storage=file://{_HERE.parent / '.build' / 'benchmarks'}", "-W", "default",
        f"--benchmark-json={file}", *([] if named else [str(_HERE)]), *pytest_arguments,
    ]  # fmt: skip
    # -m pytest puts the current folder first on the path: from bench/ the sources do not hide the package.
    code = subprocess.run(command, check=False, cwd=None if named else _HERE).returncode
    if file.exists() and file.stat().st_size > 0:
        show(file, markdown=False, plot=None)
        print(f"results: {os.path.relpath(file)}")
    return code


def show(file: Path, markdown: bool, plot: Path | None) -> None:
    results = json.loads(file.read_text())
    entries = [entry for entry in results["benchmarks"] if "milliseconds" in entry["extra_info"]]
    hardware = sorted({entry["extra_info"]["hardware"] for entry in entries})
    rows = [_cells(entry["extra_info"]) for entry in entries]
    print("; ".join(hardware))
    print("\n".join(_lines(rows, markdown)))
    for name, reason in results.get("missing_peers", {}).items():
        print(f"not measured: {name} ({reason})")
    if plot is not None:
        _plot([entry["extra_info"] for entry in entries], "; ".join(hardware), plot)


def _cells(info: dict[str, Any]) -> list[str]:
    strongest = info.get("strongest_peer", "")
    milliseconds = info["milliseconds"]
    target = info.get("target_milliseconds")
    others = [f"{name} {ratio:.1f}x" for name, ratio in info["ratios"].items() if name != strongest]
    return [
        info["shape"],
        info["dtype"],
        info["direction"],
        _time(milliseconds["effops"]) + (f" (target {_time(target)})" if target else ""),
        f"{strongest} {_time(milliseconds[strongest])}" if strongest else "",
        f"{info['ratio']:.2f}x" if strongest else "",
        ", ".join(others),
        f"{info['points_per_second'] / 1e6:.1f} M" if "points_per_second" in info else "",
        f"{info['percent_of_roofline']:.0f} %" if "percent_of_roofline" in info else "",
        "; ".join(text.format(_plain(info[name])) for name, text in _NOTES.items() if name in info),
    ]


def _plain(note: float | dict[str, float]) -> str:
    return ", ".join(f"{name} {n}" for name, n in note.items()) if isinstance(note, dict) else str(note)


def _time(milliseconds: float) -> str:
    return f"{milliseconds * 1e3:.1f} us" if milliseconds < 0.1 else f"{milliseconds:.3g} ms"


def _lines(rows: list[list[str]], markdown: bool) -> list[str]:
    if markdown:
        return [f"| {' | '.join(row)} |" for row in [list(_COLUMNS), ["---"] * len(_COLUMNS), *rows]]
    table = [list(_COLUMNS), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _plot(infos: list[dict[str, Any]], hardware: str, file: Path) -> None:
    from matplotlib.figure import Figure

    names = [f"{info['shape']}, {info['dtype']}, {info['direction']}" for info in infos]
    peers = sorted({peer for info in infos for peer in info["ratios"]})
    figure = Figure(figsize=(9, 1 + 0.22 * len(infos) * (len(peers) + 1)), dpi=110, layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(peers), 1)
    for number, peer in enumerate(peers):
        ratios = [info["ratios"].get(peer, 0) for info in infos]
        places = [position + (number - (len(peers) - 1) / 2) * height for position in range(len(infos))]
        bars = axes.barh(places, ratios, height * 0.9, label=peer)
        axes.bar_label(bars, [f"{ratio:.1f}" if ratio else "" for ratio in ratios], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(infos)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time of the peer / time of effops ({hardware})", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


if __name__ == "__main__":
    sys.exit(main())
