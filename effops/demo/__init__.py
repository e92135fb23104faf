"""The demo: every op on real photographs, checked, timed and written to a page.

``python -m effops demo`` runs it. It needs the extra ``effops[demo]``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from effops import collect_env
from effops.demo import _page
from effops.demo._extras import require
from effops.demo._section import Result, Row, Section, Settings
from effops.demo.sections import load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["Settings", "run"]


def run(settings: Settings) -> Path:
    """Runs the sections, prints a table and returns the page.

    Raises:
        MissingExtraError: a package of the extra is not installed.
        SystemExit: code 1, after the page is written, when a result is further from the definition than
            its tolerance.
    """
    require("rich", "matplotlib", "numpy", "skimage")
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console()
    settings.output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    line = f"{collect_env.hardware(settings.device)}, {threads} thread{'s' if threads != 1 else ''}"
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load_before > 0.5 * collect_env.cpu_cores():
        line += f"; other programs were running (load {load_before:.1f}), which disturbs the times"
    console.print(f"effops demo on {line}", highlight=False)

    results: list[tuple[Section, Result]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *Progress.get_default_columns()[1:3])
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=4) as progress:
        for name in settings.sections:
            section = load(name)
            task = progress.add_task(name, total=section.steps + 1)

            def step(text: str, name: str = name, task: TaskID = task) -> None:
                progress.update(task, advance=1, description=f"{name}: {text}")

            # TF32, the default of cuDNN, is too far from the definition, and effops' ops don't use it.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                results.append((section, section.run(settings, step)))
            step("done")

    page = _page.write(settings.output, results, collect_env.collect(), line)
    rows = [row for _, result in results for row in result.rows]
    _print_table(console, rows)
    console.print(f"\nPage: {page}", highlight=False, soft_wrap=True)
    if not all(row.is_correct for row in rows):
        console.print("[bold red]A result is further from the definition than its tolerance.")
        raise SystemExit(1)
    return page


def _print_table(console: Console, rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in _page.COLUMNS:
        if title != "shape":  # on the page only: it and "plain" would not fit 80 columns
            title = title.removeprefix("plain ")
            table.add_column(title, justify="left" if title in ("op", "case") else "right", no_wrap=True)
    for row in rows:
        op, case, _, *rest = _page.cells(row)
        table.add_row(op, case, *rest, style=None if row.is_correct else "bold red")
    console.print(table)
