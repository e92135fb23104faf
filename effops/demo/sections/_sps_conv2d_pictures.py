"""Pictures of a mask head that refines the masks of coins at their boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.demo import _figures
from effops.demo._photos import CREDITS
from effops.demo._section import Figure, Settings
from effops.demo.sections._sps_conv2d_head import PHOTO, REFINED, SIDES, Coins, Stage, overlap

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_MASK_COLOUR, _TARGET_COLOUR, _ACTIVE_COLOUR = "#ffd500", "#00e5ff", "#ff7b1c"
_STAGED_COIN = 3  # whose stages are drawn
_ZOOMED_COINS = (2, 5, 7, 10)
_DASHES = (0, (4, 3))
_CREDIT = f"Photograph: {CREDITS[PHOTO]}."


@dataclass(frozen=True)
class Masks:
    """Masks of coins, on the CPU.

    Attributes:
        coins: those that the head has not learnt from.
        others: those that it has learnt from.
        coarse: logits of the coarse masks, [R, 1, 8, 8].
        stages: what followed.
    """

    coins: Coins
    others: Coins
    coarse: Tensor
    stages: list[Stage]

    def boxes(self) -> Tensor:
        return self.coins.boxes.cpu()

    def overlaps(self) -> dict[str, Tensor]:
        """Intersection over union of each mask with its target: as it is, enlarged, and refined."""
        targets = self.coins.targets(SIDES[-1])
        return {
            "coarse": overlap(self.coarse, targets, "nearest-exact"),
            "enlarged": overlap(self.coarse, targets),
            "refined": overlap(self.stages[-1].logits, targets),
        }


def picture_photo(settings: Settings, masks: Masks) -> Figure:
    """The photograph with the outlines of the coarse masks, and with those of the refined ones."""
    from matplotlib.lines import Line2D

    figure, axes = _figures.canvas(1, 2, 14, 6.1)
    overlaps = masks.overlaps()
    refined = masks.stages[-1].logits
    for axis, logits, kind, words in (
        (axes[0], _blocks(masks.coarse), "coarse", f"coarse masks, {SIDES[0]} x {SIDES[0]} cells"),
        (axes[1], refined, "refined", f"after three stages, {SIDES[-1]} x {SIDES[-1]} cells"),
    ):
        title = f"{words}: mean overlap with the coins {float(overlaps[kind].mean()):.3f}"
        height, width = masks.coins.photo.shape[1:]
        _figures.show(axis, masks.coins.photo, title)
        for box, logit in zip(masks.boxes(), logits[:, 0].cpu(), strict=True):
            _outline(axis, logit, box, _MASK_COLOUR, 1.8)
        for box in masks.others.boxes.cpu().tolist():
            _draw_box(axis, box)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
    _legend(
        figure,
        Line2D([], [], color=_MASK_COLOUR, linewidth=2, label="mask of a coin that the head has not seen"),
        Line2D(
            [], [], color="white", linewidth=1, linestyle=_DASHES, label="box of a coin it has learnt from"
        ),
    )
    file = _figures.save(figure, settings.output, "sps_conv2d-coins.png")
    return Figure(
        file,
        "Coarse masks, and eight times as many cells along the boundary",
        f"A small mask head after EffSeg finds a mask of {SIDES[0]} x {SIDES[0]} cells for each coin in its "
        f"box, and refines it in three stages to {SIDES[-1]} x {SIDES[-1]}. It has learnt on this machine "
        "just now from the coins in dashed boxes; yellow outlines are those of the others. Overlap is "
        "intersection over union with the coins that a watershed finds in the whole photograph, 1 at best. "
        + _CREDIT,
    )


def picture_stages(settings: Settings, masks: Masks) -> Figure:
    """The cells of one coin and its mask in each stage."""
    coin, box = _STAGED_COIN, masks.boxes()[_STAGED_COIN]
    figure, axes = _figures.canvas(2, 4, 14, 7.6)
    grids = [torch.arange(SIDES[0] ** 2).view(SIDES[0], -1), *(s.after.index_map[coin] for s in masks.stages)]
    actives = [torch.ones(SIDES[0], SIDES[0], dtype=torch.bool), *(s.active[coin] for s in masks.stages)]
    logits = [masks.coarse[coin, 0], *(stage.logits[coin, 0] for stage in masks.stages)]
    for index, (grid, active, logit) in enumerate(zip(grids, actives, logits, strict=True)):
        side = SIDES[index]
        name = "coarse mask" if index == 0 else f"stage {index}"
        share = float(active.float().mean())
        title = f"{name}: {side} x {side} cells,\n{int(active.sum()):,} computed ({share:.0%})"
        _show_crop(axes[index], masks.coins.photo, box, title)
        _draw_cells(axes[index], grid.cpu(), active.cpu(), box)
        crop = axes[4 + index]
        shown = _figures.show(crop, logit.sigmoid().cpu(), "", cmap="gray", vmin=0, vmax=1)
        shown.set_extent(_extent(box))
        _outline(crop, logit.cpu(), box, _MASK_COLOUR, 1.5)
        _look_at(crop, box)
    axes[0].set_ylabel("cells (orange: computed)", fontsize=11)
    axes[4].set_ylabel("mask (white: 1, black: 0)", fontsize=11)
    file = _figures.save(figure, settings.output, "sps_conv2d-stages.png")
    return Figure(
        file,
        "Only the cells in doubt are computed again",
        "Each stage divides by four the cells whose mask is least certain, and computes new features for "
        f"those alone (orange); {', '.join(map(str, REFINED))} cells per coin and stage, wherever among all "
        "coins they are needed most. Each square between dark lines is one row of features. A passive row "
        "(no colour) keeps what it was given, serves all the cells that it covers, and is read by the "
        f"convolution of its active neighbours. Below: the mask, which is 1 where it is white. {_CREDIT}",
    )


def picture_boundary(settings: Settings, masks: Masks) -> Figure:
    """Outlines before and after, beside those of the targets."""
    figure, axes = _figures.canvas(2, len(_ZOOMED_COINS), 14, 8.1)
    overlaps, targets = masks.overlaps(), masks.coins.targets(SIDES[-1]).cpu()
    enlarged = F.interpolate(masks.coarse, size=SIDES[-1], mode="bilinear")
    refined = masks.stages[-1].logits
    for row, (words, kind, logits) in enumerate(
        (("enlarged", "enlarged", enlarged), ("refined", "refined", refined))
    ):
        for column, coin in enumerate(_ZOOMED_COINS):
            axis, box = axes[row * len(_ZOOMED_COINS) + column], masks.boxes()[coin]
            title = f"{words}: overlap {float(overlaps[kind][coin]):.3f}"
            _show_crop(axis, masks.coins.photo, _square(box), title)
            _outline(axis, targets[coin, 0].float() - 0.5, box, _TARGET_COLOUR, 1.4)
            _outline(axis, logits[coin, 0].cpu(), box, _MASK_COLOUR, 1.8)
    from matplotlib.lines import Line2D

    _legend(
        figure,
        Line2D([], [], color=_MASK_COLOUR, linewidth=2, label="mask of the head"),
        Line2D([], [], color=_TARGET_COLOUR, linewidth=2, label="coin, by watershed"),
    )
    file = _figures.save(figure, settings.output, "sps_conv2d-boundary.png")
    means = {kind: float(values.mean()) for kind, values in overlaps.items()}
    return Figure(
        file,
        "The boundary, before and after",
        "Above, the coarse masks are only enlarged, with bilinear interpolation; below, three stages have "
        f"refined them. Mean overlap of the {len(masks.coarse)} coins that the head has not learnt from: "
        f"{means['coarse']:.3f} as blocks, {means['enlarged']:.3f} enlarged, {means['refined']:.3f} refined. "
        + _CREDIT,
    )


def picture_cost(
    settings: Settings, masks: Masks, times: Mapping[str, Mapping[str, float]], agreement: float
) -> Figure:
    """Cells computed and milliseconds, of each stage and program."""
    figure, axes = _figures.canvas(1, 2, 14, 4.4)
    stages = [f"stage {index}" for index in range(1, len(SIDES))]
    cells = [stage.active.numel() for stage in masks.stages]
    for index, (total, stage) in enumerate(zip(cells, masks.stages, strict=True)):
        axes[0].barh(index - 0.2, len(stage.after.active), 0.38, color=_figures.EFFOPS_COLOUR)
        axes[0].barh(index + 0.2, total, 0.38, color=_figures.PLAIN_COLOUR)
        text = f" sparse: {len(stage.after.active):,} ({stage.share:.0%})"
        axes[0].text(len(stage.after.active), index - 0.2, text, va="center", fontsize=9)
        axes[0].text(total, index + 0.2, f" dense: {total:,}", va="center", fontsize=9)
    axes[0].set_yticks(range(len(stages)), stages)
    axes[0].set_xlim(0, max(cells) * 1.25)
    axes[0].set_title(f"cells computed for {len(masks.coarse)} coins", fontsize=10)
    axes[0].set_xlabel("cells")
    _draw_times(axes[1], times)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "sps_conv2d-cost.png")
    return Figure(
        file,
        "Sparse against dense: the same answer, fewer cells",
        "Left: the cells that the convolutions compute. Right: times of the three fused convolutions "
        "(dilations 1, 3 and 5) of each stage, and of the whole head, on this machine. Dense is "
        "torch.nn.functional.conv2d on all cells; gather copies the neighbours of each active cell in "
        "PyTorch, as EffSeg's own code does, and multiplies them. The dense head computes every cell and "
        "keeps the results of the active ones; computed in float64, its logits differ from the sparse head's "
        f"by at most {agreement:.0e} of the largest one.",
    )


# ------------------------------------------------------------------------------------------ drawing


_BAR_COLOURS = {"effops": _figures.EFFOPS_COLOUR, "gather": "#e08e0b", "dense": _figures.PLAIN_COLOUR}


def _draw_times(axis: Axes, times: Mapping[str, Mapping[str, float]]) -> None:
    position, ticks = 0.0, []
    for programs in times.values():
        ticks.append(position + (len(programs) - 1) / 2)
        for name, seconds in programs.items():
            axis.barh(position, seconds * 1e3, 0.8, color=_BAR_COLOURS[name])
            ratio = "" if name == "effops" else f", {seconds / programs['effops']:.1f}x"
            text = f" {name}: {seconds * 1e3:.1f} ms{ratio}"
            axis.text(seconds * 1e3, position, text, va="center", fontsize=9)
            position += 1
        position += 0.7
    axis.set_yticks(ticks, list(times))
    axis.invert_yaxis()
    axis.set_xscale("log")
    all_times = [seconds * 1e3 for programs in times.values() for seconds in programs.values()]
    axis.set_xlim(min(all_times) / 2, max(all_times) * 8)  # room for the text
    axis.set_title("times", fontsize=10)
    axis.set_xlabel("milliseconds, logarithmic scale (shorter is better)")


def _legend(figure: Canvas, *handles: Artist) -> None:
    """On dark ground, as the lines are light."""
    legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=2, fontsize=10)
    legend.get_frame().set_facecolor("#404040")
    for text in legend.get_texts():
        text.set_color("white")


def _blocks(logits: Tensor) -> Tensor:
    """Coarse masks as they are, in cells as large as those of the last stage."""
    return F.interpolate(logits, size=SIDES[-1], mode="nearest-exact")


def _extent(box: Tensor) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box.tolist()
    return x1, x2, y2, y1


def _square(box: Tensor) -> Tensor:
    """As large as the shorter side of the box, with its centre."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).min() / 2
    return torch.cat([centre - half, centre + half])


def _show_crop(axis: Axes, photo: Tensor, box: Tensor, title: str) -> None:
    _figures.show(axis, photo, title)
    axis.set_facecolor("black")  # beyond the photograph
    _look_at(axis, box)


def _look_at(axis: Axes, box: Tensor) -> None:
    left, right, bottom, top = _extent(box)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def _outline(axis: Axes, logit: Tensor, box: Tensor, colour: str, width: float) -> None:
    """Where logits [side, side] of a box are 0; nothing if they are all on one side of it."""
    signs = logit > 0
    if signs.all() or not signs.any():
        return
    left, right, bottom, top = _extent(box)
    steps = (torch.arange(len(logit)) + 0.5) / len(logit)
    x, y = left + steps * (right - left), top + steps * (bottom - top)
    axis.contour(x.numpy(), y.numpy(), logit.numpy(), levels=[0.0], colors=[colour], linewidths=width)


def _draw_box(axis: Axes, corners: Sequence[float]) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = corners
    style: dict[str, Any] = {"fill": False, "edgecolor": "white", "linewidth": 0.9, "linestyle": _DASHES}
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, alpha=0.7, **style))


def _draw_cells(axis: Axes, grid: Tensor, active: Tensor, box: Tensor) -> None:
    """Active cells in colour, and lines between cells [side, side] of different ids."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap

    left, right, bottom, top = _extent(box)
    colours = ListedColormap(["#00000000", _ACTIVE_COLOUR])
    axis.imshow(active.numpy(), cmap=colours, alpha=0.6, extent=_extent(box), vmin=0, vmax=1)
    side = len(grid)
    y, x = (grid[:, 1:] != grid[:, :-1]).nonzero().unbind(1)
    upright = torch.stack([torch.stack([x + 1, y], 1), torch.stack([x + 1, y + 1], 1)], 1)
    y, x = (grid[1:] != grid[:-1]).nonzero().unbind(1)
    level = torch.stack([torch.stack([x, y + 1], 1), torch.stack([x + 1, y + 1], 1)], 1)
    lines = torch.cat([upright, level]) / side * torch.tensor([right - left, bottom - top])
    lines = lines + torch.tensor([left, top])
    axis.add_collection(
        LineCollection(list(lines.numpy()), colors="black", linewidths=0.5, alpha=0.7), autolim=False
    )
