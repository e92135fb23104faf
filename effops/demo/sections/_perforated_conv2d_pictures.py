"""Pictures of convolutions that compute some positions of a photograph only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import MaskPlan, perforated_conv2d, plan_mask, select_conv2d
from effops.demo import _figures
from effops.demo._photos import CREDITS, load, psnr
from effops.demo._section import Figure, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FACE = (0.05, 0.36, 0.27, 0.58)  # top, bottom, left and right in parts of the photograph
_STRENGTH, _SHARPENED_EDGES, _LATTICE = 1.5, 0.04, 3

_BLUR, _RADIUS = 1.4, 4  # standard deviation and radius of the blur to be undone, in pixels
_THRESHOLDS = (0.01, 0.02, 0.03, 0.045)  # of the edge strength: one mask each
_LAYERS = 4  # per mask

_DILATIONS = ((0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 4))  # of the four branches, in three passes
_FOCUS, _DEPTH = 0.61, 0.13  # height of what is sharp, and of a step of blur, in parts of the photograph
_CHOICE_COLOURS = ("#440154", "#31688e", "#35b779", "#fde725")


def edge_strength(photo: Tensor) -> Tensor:
    """Length of the gradient of a photograph [1, 3, H, W], made a little smoother, [1, H, W]."""
    grey = gaussian_blur(photo.mean(1, keepdim=True), 1.0)
    down, across = torch.gradient(grey[:, 0], dim=(1, 2))
    return (down**2 + across**2).sqrt()


def gaussian_blur(photo: Tensor, deviation: float) -> Tensor:
    kernel = _gaussian(deviation).to(photo).expand(photo.shape[1], 1, -1, -1)
    padded = F.pad(photo, [_RADIUS] * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=photo.shape[1])


def _gaussian(deviation: float) -> Tensor:
    """[2 * _RADIUS + 1, 2 * _RADIUS + 1], of sum 1."""
    steps = torch.arange(-_RADIUS, _RADIUS + 1)
    row = torch.exp(-(steps**2) / (2 * deviation**2))
    return row[:, None] * row / row.sum() ** 2


# ------------------------------------------------------------------------------------------ fills


def picture_fills(settings: Settings) -> Figure:
    """A sharpening filter at some positions, and the three ways to fill the others."""
    photo = load("astronaut", settings.photo_side)[None].to(settings.device)
    height, width = photo.shape[2:]
    mask = edge_strength(photo) > _SHARPENED_EDGES
    mask[:, ::_LATTICE, ::_LATTICE] = True
    plan = plan_mask(mask)
    sharpen = -_STRENGTH * _gaussian(2.0)
    sharpen[_RADIUS, _RADIUS] += 1 + _STRENGTH
    weight = torch.zeros(3, 3, *sharpen.shape)
    weight[range(3), range(3)] = sharpen
    apply = partial(
        perforated_conv2d,
        F.pad(photo, [_RADIUS] * 4, mode="replicate"),
        weight.to(settings.device),
    )
    everywhere = apply(plan_mask(torch.ones_like(mask)))
    share = f"{plan.density:.0%} of the positions"
    panels = {
        "photograph": photo,
        f"mask: white is computed, {share}": mask[:, None].float().expand(-1, 3, -1, -1),
        "for comparison: sharpened everywhere": everywhere,
        'fill="zero": black elsewhere': apply(plan),
        'fill="keep": elsewhere the photograph itself': apply(plan, fill="keep", base=photo),
        'fill="nearest": elsewhere the nearest result': apply(plan, fill="nearest"),
    }
    figure, axes = _figures.canvas(2, 3, 13, 9.2)
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        _figures.show(axis, _cut(image[0].cpu(), _FACE), title, interpolation="nearest")
    file = _figures.save(figure, settings.output, "perforated_conv2d-fills.png")
    return Figure(
        file,
        "A filter at some positions, and what is elsewhere",
        f"A filter of {2 * _RADIUS + 1} x {2 * _RADIUS + 1} taps sharpens a photograph of {width} x {height} "
        f"pixels (a part of it is shown), at its edges and at every third pixel of every "
        f'third row: {share}. At those, all results are equal. "keep" suits residual units, and '
        '"nearest" is the interpolation of PerforatedCNNs, good where the result is smooth. '
        f"Photograph: {CREDITS['astronaut']}.",
    )


def _cut(image: Tensor, part: tuple[float, float, float, float]) -> Tensor:
    height, width = image.shape[1:]
    top, bottom, left, right = part
    rows = slice(round(top * height), round(bottom * height))
    return image[:, rows, round(left * width) : round(right * width)]


# ------------------------------------------------------------------------------------------ deblurring


@dataclass(frozen=True)
class Deblurring:
    """A stack of gated residual units x <- x + G * (blurred - blur(x)): it undoes a known blur.

    The weights are those of Van Cittert's iteration. Each gate G serves some layers.

    Attributes:
        photo, blurred: [1, 3, H, W].
        plans: of the gates.
        weight: from (x, blurred) to x + blurred - blur(x), [3, 6, k, k].
    """

    photo: Tensor
    blurred: Tensor
    plans: list[MaskPlan]
    weight: Tensor

    def effops(self) -> Tensor:
        """The stack at the edges: positions outside the gate keep x."""
        x = self.blurred
        for plan in self.plans:
            for _ in range(_LAYERS):
                x = perforated_conv2d(self._stacked(x), self.weight, plan, fill="keep", base=x)
        return x

    def plain(self) -> Tensor:
        """The same with a dense convolution, whose results outside the gate are dropped."""
        x = self.blurred
        for plan in self.plans:
            for _ in range(_LAYERS):
                x = torch.where(plan.mask[:, None], F.conv2d(self._stacked(x), self.weight), x)
        return x

    def everywhere(self) -> Tensor:
        x = self.blurred
        for _ in range(_LAYERS * len(self.plans)):
            x = F.conv2d(self._stacked(x), self.weight)
        return x

    def _stacked(self, x: Tensor) -> Tensor:
        return F.pad(torch.cat([x, self.blurred], 1), [_RADIUS] * 4, mode="replicate")

    def double(self) -> Deblurring:
        return Deblurring(self.photo.double(), self.blurred.double(), self.plans, self.weight.double())

    @property
    def shape(self) -> str:
        height, width = self.photo.shape[2:]
        count, side = _LAYERS * len(self.plans), self.weight.shape[2]
        return f"{width} x {height} pixels, {count} layers of {side} x {side}, {self.density:.0%} computed"

    @property
    def density(self) -> float:
        return sum(plan.density for plan in self.plans) / len(self.plans)

    @property
    def ponder_map(self) -> Tensor:
        """How many layers compute each pixel, [H, W]."""
        return torch.stack([plan.mask[0] for plan in self.plans]).sum(0) * _LAYERS


def make_deblurring(settings: Settings) -> Deblurring:
    photo = load("astronaut", settings.photo_side)[None].to(settings.device)
    blurred = (gaussian_blur(photo, _BLUR) * 255).round() / 255
    strength = edge_strength(blurred)
    blur = _gaussian(_BLUR)
    weight = torch.zeros(3, 6, *blur.shape)
    weight[range(3), range(3)] = -blur
    weight[range(3), range(3), _RADIUS, _RADIUS] += 1
    weight[range(3), range(3, 6), _RADIUS, _RADIUS] = 1
    plans = [plan_mask(strength > threshold) for threshold in _THRESHOLDS]
    return Deblurring(photo, blurred, plans, weight.to(settings.device))


def picture_ponder(settings: Settings, stack: Deblurring) -> Figure:
    """The masks of the layers, and their sum."""
    from matplotlib.colors import BoundaryNorm

    figure, axes = _figures.canvas(1, len(stack.plans) + 1, 15, 3.1)
    for index, plan in enumerate(stack.plans):
        title = f"layers {index * _LAYERS + 1} to {(index + 1) * _LAYERS}: {plan.density:.0%}"
        _figures.show(axes[index], plan.mask[0].cpu(), title, cmap="gray", vmin=0, vmax=1)
    title = f"ponder map, mean {float(stack.ponder_map.float().mean()):.1f} layers"
    counts = [_LAYERS * index for index in range(len(stack.plans) + 1)]
    norm = BoundaryNorm([count - _LAYERS / 2 for count in [*counts, counts[-1] + _LAYERS]], 256)
    shown = _figures.show(axes[-1], stack.ponder_map.cpu(), title, cmap="inferno", norm=norm)
    figure.colorbar(shown, ax=axes[-1], ticks=counts, label="layers that compute a pixel", shrink=0.8)
    file = _figures.save(figure, settings.output, "perforated_conv2d-ponder.png")
    return Figure(
        file,
        "Where each layer computes",
        f"{_LAYERS * len(stack.plans)} residual units remove the blur of the photograph below. Each computes "
        "where the photograph has edges (white), the later ones where they are strong. plan_mask finds the "
        f"positions of a mask once for all the {_LAYERS} layers that use it. The ponder map is the sum of "
        "all masks, as in pixel-wise attentional gating (PAG): how much work each pixel gets.",
    )


def picture_deblurring(settings: Settings, stack: Deblurring) -> Figure:
    """Before, and after all layers, everywhere and at the edges."""
    figure, axes = _figures.canvas(2, 4, 15, 7.9)
    panels = (
        ("photograph", stack.photo, ""),
        ("blurred", stack.blurred, ""),
        ("restored everywhere", stack.everywhere(), ", 100% computed"),
        ("restored at the edges", stack.effops(), f", {stack.density:.0%} computed"),
    )
    for index, (title, image, share) in enumerate(panels):
        if index > 0:
            title += f": {psnr(image, stack.photo):.1f} dB{share}"
        _figures.show(axes[index], image[0].cpu(), title)
        _figures.show(axes[4 + index], _cut(image[0].cpu(), _FACE), "", interpolation="nearest")
    file = _figures.save(figure, settings.output, "perforated_conv2d-deblurred.png")
    return Figure(
        file,
        "The edges are where the work is",
        f"The photograph was blurred by {_BLUR} pixels and rounded to 8 bits. Residual units x + G (blurred "
        "- blur(x)), Van Cittert's iteration, restore it. Computed only where G = 1, at the edges, they "
        "restore it nearly as well as everywhere. Decibels: peak signal-to-noise ratio, more is closer to "
        f"the photograph. Photograph: {CREDITS['astronaut']}.",
    )


# ------------------------------------------------------------------------------------------ times


def picture_densities(
    settings: Settings, times: Mapping[str, Sequence[float]], dense: float, densities: Sequence[float]
) -> Figure:
    """Milliseconds over the part of the positions that is computed."""
    figure, (axes,) = _figures.canvas(1, 1, 9, 4.6)
    styles = {
        "effops, mask of edges": (_figures.EFFOPS_COLOUR, "o-"),
        "effops, random mask": (_figures.EFFOPS_COLOUR, "s:"),
        "gather in PyTorch, mask of edges": ("#e08e0b", "o-"),
    }
    shares = [100 * density for density in densities]
    for name, (colour, style) in styles.items():
        axes.plot(shares, [1e3 * seconds for seconds in times[name]], style, color=colour, label=name)
    axes.axhline(1e3 * dense, color="#7f7f7f", linewidth=2, label="torch conv2d everywhere, times the mask")
    axes.set_ylim(0, 2.2e3 * dense)
    axes.set_xlim(0, 100)
    axes.set_xlabel("positions computed, percent")
    axes.set_ylabel("milliseconds (lower is better)")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "perforated_conv2d-densities.png")
    return Figure(
        file,
        "Times on this machine",
        "One 3 x 3 convolution of 64 channels on 128 x 128 positions. The edges are those of the photograph "
        "above at this resolution. Gather copies the neighbours of the kept positions in PyTorch and "
        "multiplies them. Where most positions are kept, effops computes everywhere, too. Shortest of "
        "several runs, the programs taking turns.",
    )


# ------------------------------------------------------------------------------------------ select


def picture_select(settings: Settings) -> Figure:
    """Depth of field: the dilation of each pixel's filter depends on how far it is from the focus."""
    photo = load("coffee", settings.photo_side)[None].to(settings.device)
    height, width = photo.shape[2:]
    rows = (torch.arange(height, device=photo.device) + 0.5) / height
    choice = ((rows - _FOCUS).abs() / _DEPTH).long().clamp(max=3)[None, :, None].expand(1, -1, width)
    row = torch.tensor([0.25, 0.5, 0.25])
    weights = torch.zeros(4, 4, 4, 3, 3)
    weights[:, range(4), range(4)] = row[:, None] * row
    x = torch.cat([photo, torch.ones_like(photo[:, :1])], 1)  # ones count the taps inside the photograph
    for dilations in _DILATIONS:
        x = select_conv2d(x, weights.to(photo), choice, dilations)
    picture = x[:, :3] / x[:, 3:]

    from matplotlib.colors import ListedColormap

    figure, axes = _figures.canvas(1, 3, 15, 3.7)
    _figures.show(axes[0], photo[0].cpu(), "photograph")
    colours = ListedColormap(list(_CHOICE_COLOURS))
    title = "branch of each pixel: dilations of the three passes"
    _figures.show(axes[1], choice[0].cpu(), title, cmap=colours, vmin=0, vmax=3)
    _label_branches(axes[1], choice[0, :, 0].cpu(), width)
    _figures.show(axes[2], picture[0].cpu(), "three passes of select_conv2d")
    file = _figures.save(figure, settings.output, "select_conv2d-focus.png")
    return Figure(
        file,
        "A filter of its own for every pixel",
        "select_conv2d computes for each pixel one of several convolutions only: here smoothing with "
        "dilations that grow with the distance from the spoon, as a lens would blur the table. Dilation 0 "
        f"copies the pixel. In PAG's MultiPool a network makes the choice. Photograph: {CREDITS['coffee']}.",
    )


def _label_branches(axis: Axes, choice: Tensor, width: int) -> None:
    """The dilations of each run of rows."""
    starts = [0, *((choice[1:] != choice[:-1]).nonzero()[:, 0] + 1).tolist(), len(choice)]
    for start, stop in zip(starts, starts[1:], strict=False):
        branch = int(choice[start])
        dilations = ", ".join(str(dilations[branch]) for dilations in _DILATIONS)
        text = "copy" if branch == 0 else dilations
        colour = "white" if branch < 2 else "black"
        axis.text(width / 2, (start + stop) / 2, text, color=colour, ha="center", va="center")
