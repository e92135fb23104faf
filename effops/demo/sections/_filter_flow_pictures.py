"""Pictures of a noisy photograph that every pixel's own filter denoises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import filter_flow
from effops.demo import _figures
from effops.demo._extras import MissingExtraError, require
from effops.demo._photos import CREDITS, load, psnr
from effops.demo._section import Figure, Settings

KERNEL = 11
_PHOTO, _LONGEST = "coffee", 384
_NOISE = 0.1  # standard deviation

#: Standard deviations of the filters in space (pixels) and in colour, for colours of pixels and of patches.
#: They suit another photograph (astronaut) best.
_PIXEL_WIDTHS, _PATCH_WIDTHS = (1.5, 0.3), (3.0, 0.15)
_PEER_WIDTHS = [(space, colour) for space in (1.0, 1.5, 2.0) for colour in (0.3, 0.4, 0.5, 0.6)]

_DETAIL = (0.34, 0.7, 0.1, 0.46)  # top, bottom, left and right in parts of the photograph
_PLACES = {  # row and column of some pixels in parts of the photograph
    "coffee": (0.4, 0.45),
    "edge of the saucer": (0.4, 0.147),
    "edge of the cup": (0.3, 0.2965),
    "spoon": (0.7, 0.61),
}
_BEHIND_LETTERS = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1}


def filters_of(picture: Tensor, patch: int, widths: tuple[float, float]) -> Tensor:
    """Logits [1, K * K, H, W] of a bilateral filter: less for what is further away or of another colour.

    Colours are compared between single pixels (a patch of 1) or whole patches around them, as in non-local
    means. The softmax of filter_flow normalises.
    """
    height, width = picture.shape[2:]
    radius = KERNEL // 2
    steps = torch.arange(KERNEL, device=picture.device) - radius
    padded = F.pad(picture, [radius] * 4, mode="reflect")
    differences = [
        (picture - padded[:, :, row : row + height, column : column + width]).square().sum(1)
        for row in range(KERNEL)
        for column in range(KERNEL)
    ]
    in_colour = F.pad(torch.stack(differences, 1), [patch // 2] * 4, mode="replicate")
    in_colour = F.avg_pool2d(in_colour, patch, stride=1)
    in_space = (steps[:, None] ** 2 + steps**2).view(1, -1, 1, 1)
    space, colour = widths
    return -in_space / (2 * space**2) - in_colour / (2 * colour**2)


@dataclass(frozen=True)
class Denoising:
    """A noisy photograph, and filters for its pixels predicted from itself.

    Attributes:
        photo, noisy: [1, 3, H, W].
        by_pixel, by_patch: logits of filters that compare pixels, and patches of 3 x 3.
    """

    photo: Tensor
    noisy: Tensor
    by_pixel: Tensor
    by_patch: Tensor

    def filtered(self, filters: Tensor) -> Tensor:
        """Taps outside the photograph take no part, so that borders get no darker."""
        return cast(Tensor, filter_flow(self.noisy, filters, padding_mode="renormalize"))


def make_denoising(settings: Settings) -> Denoising:
    photo = load(_PHOTO, min(settings.photo_side, _LONGEST))[None]
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    noisy = (photo + _NOISE * noise).clamp(0, 1).to(settings.device)
    by_pixel = filters_of(noisy, 1, _PIXEL_WIDTHS)
    return Denoising(photo.to(settings.device), noisy, by_pixel, filters_of(noisy, 3, _PATCH_WIDTHS))


# ------------------------------------------------------------------------------------------ denoising


def picture_denoising(settings: Settings, denoising: Denoising) -> Figure:
    """Before and after, and OpenCV's bilateral filter; all of it and a detail."""
    photo = denoising.photo
    panels = [("photograph", photo), ("with noise", denoising.noisy)]
    try:
        panels.append(("OpenCV's bilateral filter", _opencv(denoising)))
        peer = (
            f"OpenCV's has the best of {len(_PEER_WIDTHS)} pairs of widths for this very photograph, "
            "filter_flow's are those of another one. "
        )
    except MissingExtraError as error:
        peer = f"Without OpenCV's bilateral filter: {error}. "
    panels.append(("filter_flow, pixels compared", denoising.filtered(denoising.by_pixel)))
    panels.append(("filter_flow, patches compared", denoising.filtered(denoising.by_patch)))

    figure, axes = _figures.canvas(2, len(panels), 16, 4.7)
    for index, (title, picture) in enumerate(panels):
        if index > 0:
            title += f": {psnr(picture, photo):.1f} dB"
        _figures.show(axes[index], picture[0], title)
        _figures.show(axes[len(panels) + index], _detail(picture[0]), "", interpolation="nearest")
    file = _figures.save(figure, settings.output, "filter_flow-denoised.png")
    height, width = photo.shape[2:]
    return Figure(
        file,
        "Noise taken out by a filter of its own for every pixel",
        f"A photograph of {width} x {height} pixels with noise of standard deviation {_NOISE}. Each pixel "
        f"becomes a weighted mean of the {KERNEL} x {KERNEL} around it; the logits of the weights are plain "
        "PyTorch, made from the noisy photograph: distance in space and in colour. With colours of single "
        "pixels that is a bilateral filter. The same op takes any other filters, here from patches of 3 x 3, "
        f"which are less noisy, or those of a network. {peer}Decibels: peak signal-to-noise ratio, more is "
        f"closer to the photograph. Photograph: {CREDITS[_PHOTO]}.",
    )


def _opencv(denoising: Denoising) -> Tensor:
    """OpenCV's bilateral filter of the same size, with the widths that suit this photograph best."""
    require("cv2")
    import cv2

    noisy = _figures.pixels(denoising.noisy[0]).copy()
    results = [
        torch.from_numpy(cv2.bilateralFilter(noisy, KERNEL, colour, space)).permute(2, 0, 1)[None]
        for space, colour in _PEER_WIDTHS
    ]
    photo = denoising.photo.cpu()
    return max(results, key=lambda result: psnr(result, photo))


def _detail(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    top, bottom, left, right = _DETAIL
    rows = slice(round(top * height), round(bottom * height))
    return image[:, rows, round(left * width) : round(right * width)]


# ------------------------------------------------------------------------------------------ filters


def picture_filters(settings: Settings, denoising: Denoising) -> Figure:
    """Windows of the noisy photograph around some pixels, and the filters there."""
    from matplotlib.patches import Rectangle

    noisy, radius = denoising.noisy[0], KERNEL // 2
    height, width = noisy.shape[1:]
    places = [
        (
            min(max(round(row * height), radius), height - 1 - radius),
            min(max(round(column * width), radius), width - 1 - radius),
        )
        for row, column in _PLACES.values()
    ]
    figure, axes = _figures.canvas(3, 1 + len(places), 14, 7.6)
    rows = {
        "with noise, and the windows": (noisy, None),
        "filters by colours of pixels": (denoising.filtered(denoising.by_pixel)[0], denoising.by_pixel[0]),
        "filters by colours of patches": (denoising.filtered(denoising.by_patch)[0], denoising.by_patch[0]),
    }
    for line, (title, (picture, filters)) in enumerate(rows.items()):
        first, *others = axes[line * (1 + len(places)) :][: 1 + len(places)]
        _figures.show(first, picture, title)
        for axis, letter, name, (y, x) in zip(others, "ABCD", _PLACES, places, strict=True):
            if filters is None:
                box = (x - radius, y - radius)
                first.add_patch(Rectangle(box, KERNEL, KERNEL, fill=False, edgecolor="white", linewidth=1.5))
                first.annotate(letter, box, color="white", ha="right", va="bottom", bbox=_BEHIND_LETTERS)
                window = noisy[:, y - radius : y + radius + 1, x - radius : x + radius + 1]
                _figures.show(axis, window, f"{letter}: {name}", interpolation="nearest")
            else:
                weights = filters[:, y, x].softmax(0).view(KERNEL, KERNEL)
                shown = f"largest weight {float(weights.max()):.2f}"
                _figures.show(axis, weights.sqrt(), shown, cmap="inferno", vmin=0, interpolation="nearest")
    file = _figures.save(figure, settings.output, "filter_flow-filters.png")
    return Figure(
        file,
        "The filters at some pixels",
        f"Above: the {KERNEL} x {KERNEL} pixels around four pixels. Below: square roots of their weights, "
        "each picture scaled by itself. In even areas the filter spreads, at an edge it stays on the side of "
        "its pixel. filter_flow reads the logits and never stores the windows or the normalised weights.",
    )


# ------------------------------------------------------------------------------------------ times


def picture_times(
    settings: Settings, times: Mapping[str, Sequence[float]], kernels: Sequence[int], shape: str
) -> Figure:
    """Milliseconds over the size of the filters."""
    figure, (axes,) = _figures.canvas(1, 1, 9, 4.6)
    colours = (_figures.EFFOPS_COLOUR, "#7f7f7f", "#e08e0b")
    for (name, seconds), colour in zip(times.items(), colours, strict=True):
        axes.plot(kernels, [1e3 * value for value in seconds], "o-", color=colour, label=name)
    axes.set_yscale("log")
    axes.set_xticks(kernels, [f"{kernel} x {kernel}" for kernel in kernels])
    axes.set_xlabel("pixels that each pixel is a mean of")
    axes.set_ylabel("milliseconds, logarithmic scale (lower is better)", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "filter_flow-times.png")
    return Figure(
        file,
        "Times on this machine",
        f"Softmax over the taps and weighted mean of {shape}. unfold copies the window of every pixel, which "
        "takes K * K times the memory of the photograph. Shortest of several runs, the programs taking "
        "turns.",
    )
