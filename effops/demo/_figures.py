"""Pictures of the demo, drawn with matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from effops.demo._section import Row

EFFOPS_COLOUR, PLAIN_COLOUR = "#1b6ca8", "#b8b8b8"


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Canvas, list[Axes]]:
    """A figure without display or global state, and its rows * columns axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def save(figure: Canvas, folder: Path, file: str) -> str:
    """Writes the PNG; returns its file name."""
    figure.savefig(folder / file)
    return file


def pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """[3, H, W] or [H, W] as an array that matplotlib shows."""
    array: np.ndarray[Any, Any] = (image.permute(1, 2, 0) if image.dim() == 3 else image).cpu().numpy()
    return array


def show(axes: Axes, image: Tensor, title: str, size: tuple[int, int] | None = None, **style: Any) -> Any:
    """Shows an image without ticks, over (W, H) = `size` units of the axes (default: its pixels)."""
    height, width = image.shape[-2:]
    right, bottom = size or (width, height)
    if image.dim() == 3:
        image = image.clamp(0, 1)
    shown = axes.imshow(pixels(image), extent=(0, right, bottom, 0), **style)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    return shown


def bars_of_times(rows: Sequence[Row], folder: Path, file: str) -> str:
    """Bars of milliseconds per row: the op and plain PyTorch, with the ratio written beside."""
    figure, (axes,) = canvas(1, 1, 9, 0.8 + 0.62 * len(rows))
    positions = torch.arange(len(rows)).tolist()
    for offset, label, colour, times in (
        (-0.2, "effops", EFFOPS_COLOUR, [row.seconds * 1e3 for row in rows]),
        (0.2, "plain PyTorch (grid_sample)", PLAIN_COLOUR, [row.plain_seconds * 1e3 for row in rows]),
    ):
        axes.barh([position + offset for position in positions], times, 0.38, label=label, color=colour)
    for position, row in zip(positions, rows, strict=True):
        text = f" {row.ratio:.1f}x"
        axes.text(row.seconds * 1e3, position - 0.2, text, va="center", fontsize=9, color=EFFOPS_COLOUR)
    axes.set_yticks(positions, [row.case for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, logarithmic scale (shorter is better)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, folder, file)
