"""Pictures of roi_align and point_sample at work on photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import point_sample, roi_align
from effops.demo import _figures
from effops.demo._photos import CREDITS, load
from effops.demo._section import Figure, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STRIDES = (1, 2, 4, 8)
_BINS = 48  # rows and columns of a crop

# Boxes on two photographs: name, (x1, y1, x2, y2) in parts of the photograph, colour.
_BOXES = {
    "coffee": (
        ("saucer", (0.115, 0.03, 0.81, 0.985), "#00b7c3"),
        ("cup", (0.28, 0.03, 0.71, 0.53), "#ffd500"),
        ("spoon", (0.53, 0.565, 0.685, 0.83), "#9be15d"),
    ),
    "rocket": (
        ("tower", (0.255, 0.27, 0.335, 0.965), "#00b7c3"),
        ("rocket", (0.44, 0.25, 0.56, 0.99), "#ffd500"),
        ("light", (0.62, 0.855, 0.725, 0.985), "#9be15d"),
    ),
}


def _average_pyramid(photo: Tensor, device: str) -> list[Tensor]:
    """The photographs [B, 3, H, W] at strides 1, 2, 4 and 8, each pixel a mean of 4 of the map before."""
    height, width = (side // _STRIDES[-1] * _STRIDES[-1] for side in photo.shape[2:])
    maps = [photo[:, :, :height, :width].contiguous().to(device)]
    while len(maps) < len(_STRIDES):
        maps.append(F.avg_pool2d(maps[-1], 2))
    return maps


def _pixel_centres(height: int, width: int) -> Tensor:
    """(x, y) in [0, 1] of every pixel, [H * W, 2]."""
    y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
    return torch.cartesian_prod(y, x).flip(1)


def picture_boxes(settings: Settings) -> Figure:
    """Boxes on two photographs of one batch, and the crop of each box."""
    side = min(settings.photo_side, 600)  # both photographs are 3 : 2, so they have one size then
    maps = _average_pyramid(torch.stack([load(name, side) for name in _BOXES]), settings.device)
    height, width = maps[0].shape[2:]
    entries = [(image, *box) for image, boxes in enumerate(_BOXES.values()) for box in boxes]
    corners = torch.tensor([box for _, _, box, _ in entries]) * torch.tensor([width, height, width, height])
    size = corners[:, 2:] - corners[:, :2]
    level = (size.prod(1).sqrt() / _BINS).log2().floor().clamp(0, len(maps) - 1).long()
    images = torch.tensor([image for image, *_ in entries])
    rois = torch.cat([images[:, None].float(), corners], 1)
    crops = roi_align(
        maps, rois.to(settings.device), level.to(settings.device), _BINS, strides=_STRIDES
    ).cpu()

    figure, axes = _figures.canvas(2, 4, 13, 6.6)
    grid: Any = axes[0].get_gridspec()
    grid.set_width_ratios([2.1, 1, 1, 1])
    for image, name in enumerate(_BOXES):
        _figures.show(axes[4 * image], maps[0][image].cpu(), f'"{name}", {width} x {height} pixels')
    for roi, (image, name, _, colour) in enumerate(entries):
        _draw_box(axes[4 * image], corners[roi].tolist(), colour, name)
        axis = axes[roi + 1 + image]
        box_width, box_height = size[roi].tolist()
        title = f"{name}: {box_width:.0f} x {box_height:.0f} pixels,\nread at stride {_STRIDES[level[roi]]}"
        _figures.show(axis, crops[roi], title, (box_width, box_height), interpolation="nearest")
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=3)
    file = _figures.save(figure, settings.output, "roi_align-boxes.png")
    return Figure(
        file,
        "What six boxes frame",
        f"One call of roi_align turns all six boxes, on two photographs of one batch, into {_BINS} x {_BINS} "
        "bins each. A large box is read from a coarse map and a small one from a fine map, so that a bin "
        f"covers about one or two pixels of its map. Each crop is drawn in the shape of its box and must "
        "show what the box of the same colour frames. "
        f"Photographs: {CREDITS['coffee']}; {CREDITS['rocket']}.",
    )


def _draw_box(axis: Axes, corners: Sequence[float], colour: str, name: str) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = corners
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2))
    label = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
    above = y1 > 30
    axis.text(x1, y1, name, va="bottom" if above else "top", fontsize=9, fontweight="bold", bbox=label)


def picture_points(settings: Settings) -> Figure:
    """PointRend's way with a photograph: a coarse picture, made sharp at the points that need it."""
    maps = _average_pyramid(load("coffee", settings.photo_side)[None], settings.device)
    height, width = maps[0].shape[2:]
    everywhere = _pixel_centres(height, width).to(settings.device)
    coarse = _sample(maps, 3, everywhere)
    detail = (_sample(maps, 2, everywhere) - coarse).abs().sum(1)  # of two coarse maps, not of the answer
    around = detail.view(1, height, width)
    for _ in range(2):
        around = F.avg_pool2d(around, 7, stride=1, padding=3, count_include_pad=False)
    chosen = around.flatten().topk(len(detail) // 8).indices
    colours = _sample(maps, 0, everywhere[chosen])
    refined = coarse.index_copy(0, chosen, colours)

    def image(rows: Tensor) -> Tensor:
        return rows.t().reshape(3, height, width).cpu()

    photo = maps[0][0].cpu()
    figure, axes = _figures.canvas(2, 2, 11, 7.8)
    _figures.show(axes[0], image(coarse), f"stride 8, {_decibels(image(coarse), photo)}")
    dark = torch.zeros_like(coarse) + 0.08
    title = f"{len(chosen):,} points of {height * width:,}, in the colours sampled"
    _figures.show(axes[1], image(dark.index_copy(0, chosen, colours)), title)
    _figures.show(axes[2], image(refined), f"stride 8 and the points, {_decibels(image(refined), photo)}")
    _figures.show(axes[3], photo, "photograph")
    file = _figures.save(figure, settings.output, "point_sample-refined.png")
    return Figure(
        file,
        "An eighth of the points makes the edges sharp",
        "As in PointRend, point_sample first reads the stride-8 map at every pixel (top left). The eighth of "
        "the pixels around which the maps of strides 8 and 4 differ most are mostly edges, and only there it "
        "reads the finest map (top right). Together they are sharp where it matters. Decibels: peak "
        f"signal-to-noise ratio, more is closer to the photograph. Photograph: {CREDITS['coffee']}.",
    )


def picture_gaze(settings: Settings) -> Figure:
    """Every pixel is a point whose map depends on how far it is from where somebody looks."""
    maps = _average_pyramid(load("chelsea", settings.photo_side)[None], settings.device)
    height, width = maps[0].shape[2:]
    everywhere = _pixel_centres(height, width)
    gaze = torch.tensor([0.385, 0.385])
    distance = ((everywhere - gaze) * torch.tensor([width / height, 1.0])).norm(dim=1)
    level = (distance * 6).long().clamp(max=len(maps) - 1)
    batch = torch.zeros_like(level)
    sides = torch.tensor([(width // stride, height // stride) for stride in _STRIDES])[level]
    inside = everywhere.clamp(0.5 / sides, 1 - 0.5 / sides)  # no dark edge: beyond the map all is 0
    points = (tensor.to(settings.device) for tensor in (batch, level, inside))
    picture = point_sample(maps, *points).t().reshape(3, height, width).cpu()

    figure, axes = _figures.canvas(1, 3, 14, 3.7)
    _figures.show(axes[0], maps[0][0].cpu(), "photograph")
    strides = torch.tensor(_STRIDES)[level].view(height, width)
    _figures.show(axes[1], strides.log2(), "stride of the map each point reads", cmap="viridis", vmax=3.6)
    for index, stride in enumerate(_STRIDES):
        x = gaze[0] * width + (0 if index == 0 else (index + 0.5) / 6 * height)
        axes[1].text(float(x), float(gaze[1] * height), str(stride), color="white", ha="center", va="center")
    _figures.show(axes[2], picture, f"one call, {len(level):,} points")
    file = _figures.save(figure, settings.output, "point_sample-gaze.png")
    return Figure(
        file,
        "Every point on a map of its own",
        "The cat as somebody sees it who looks at its eye on the left: each pixel is a point, and the "
        "further it is from that eye, the coarser the map it reads. Sharp rings that grow blurred "
        f"outwards, without shifts between them, are right. Photograph: {CREDITS['chelsea']}.",
    )


def _sample(maps: Sequence[Tensor], level: int, xy: Tensor) -> Tensor:
    """Colours [N, 3] of one map at the points xy [N, 2]."""
    batch = torch.zeros(len(xy), dtype=torch.int64, device=xy.device)
    centre = 0.5 / xy.new_tensor([maps[level].shape[3], maps[level].shape[2]])
    inside = xy.clamp(centre, 1 - centre)  # no dark edge: beyond the map all is 0
    colours: Tensor = point_sample(maps, batch, torch.full_like(batch, level), inside)
    return colours


def _decibels(picture: Tensor, photo: Tensor) -> str:
    return f"{float(-10 * F.mse_loss(picture, photo).log10()):.1f} dB"
