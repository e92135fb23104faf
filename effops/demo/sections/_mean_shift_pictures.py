"""Pictures of a photograph whose pixels mean shift groups by colour and place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import assign_modes, mean_shift
from effops.demo import _figures
from effops.demo._photos import CREDITS, load
from effops.demo._section import Figure, Settings

KAPPA = 150.0
_PHOTO, _LONGEST = "astronaut", 112
_SHARPER = 4  # how many times finer the photograph below the outlines is

#: One bandwidth of each feature: lightness and the two differences of colours, of channels from 0 to 1, and
#: the place in parts of the longer side.
_BANDWIDTHS = (0.08, 0.045, 0.045, 0.15, 0.15)

_SHOWN = (0, 2, 5, 10)  # iterations
_KAPPAS = {"wide kernel": KAPPA / 1.5, "middle": KAPPA, "narrow kernel": KAPPA * 2}
_LEGEND = (
    "above:\nthe colour at the position\nof each pixel\n\n"
    "below:\nthe position itself, ten\nchannels in three colours"
)
_SMALLEST = 20  # pixels of a segment
_OUTLINE = torch.tensor([1.0, 1.0, 0.0])


def features_of(photo: Tensor) -> Tensor:
    """Lightness, red - green, yellow - blue, x and y of each pixel in bandwidths, [H W, 5]."""
    height, width = photo.shape[1:]
    longer = max(height, width)
    y, x = torch.meshgrid(
        (torch.arange(height, device=photo.device) + 0.5 - height / 2) / longer,
        (torch.arange(width, device=photo.device) + 0.5 - width / 2) / longer,
        indexing="ij",
    )
    red, green, blue = photo
    lightness = (red + green + blue) / 3 - 0.5
    features = torch.stack([lightness, red - green, (red + green) / 2 - blue, x, y], 2)
    return (features / features.new_tensor(_BANDWIDTHS)).flatten(0, 1)


def embed(features: Tensor) -> Tensor:
    """Features [N, 5] on the unit sphere, [N, 10]: each is an angle on a circle of its own.

    With a = sqrt(5 / KAPPA) f the unit vector is x = (cos a_1, sin a_1, ..., cos a_5, sin a_5) / sqrt(5), so
    that for two pixels

        KAPPA (x . x' - 1) = KAPPA / 5 sum_i (cos(a_i - a'_i) - 1), about -1/2 sum_i (f_i - f'_i)^2

    The kernel of mean_shift is thus that of classical mean shift in the features, a Gaussian of standard
    deviation 1, the same everywhere. KAPPA is large enough that the features of a photograph take no more
    than about half of their circles.
    """
    angles = features * math.sqrt(5 / KAPPA)
    return torch.stack([angles.cos(), angles.sin()], 2).flatten(1) / math.sqrt(5)


def colours_at(points: Tensor) -> Tensor:
    """The colours [N, 3] at points [N, 10] of the sphere: back from the angles."""
    pairs = points.view(-1, 5, 2)
    features = torch.atan2(pairs[:, :, 1], pairs[:, :, 0]) / math.sqrt(5 / KAPPA)
    lightness, red_green, yellow_blue = (features * features.new_tensor(_BANDWIDTHS))[:, :3].unbind(1)
    blue = lightness + 0.5 - yellow_blue * 2 / 3
    red = blue + yellow_blue + red_green / 2
    return torch.stack([red, red - red_green, blue], 1)


def threshold(kappa: float) -> float:
    """For assign_modes: joins modes that are less than one bandwidth of the kernel apart."""
    return 1 - 1 / (4 * kappa)


@dataclass(frozen=True)
class Pixels:
    """A photograph and its pixels on the way to their modes.

    Attributes:
        photo: [3, H, W].
        sharp: the same photograph, finer.
        iterates: [11, H W, 10]: where the pixels are on the sphere, before and after each iteration.
    """

    photo: Tensor
    sharp: Tensor
    iterates: Tensor


def make_pixels(settings: Settings) -> Pixels:
    side = min(settings.photo_side, _LONGEST)
    photo = load(_PHOTO, side).to(settings.device)
    points = embed(features_of(photo))
    iterates = mean_shift(points, KAPPA, iterations=max(_SHOWN), return_all=True)
    return Pixels(photo, load(_PHOTO, _SHARPER * side), iterates)


def photo_features(side: int) -> Tensor:
    """The features of the photograph at side x side pixels."""
    return features_of(load(_PHOTO, side))


def points_of(settings: Settings, side: int) -> Tensor:
    """The pixels of the photograph at side x side on the sphere."""
    return embed(photo_features(side).to(settings.device))


# ------------------------------------------------------------------------------------------ iterations


def picture_iterations(settings: Settings, pixels: Pixels) -> Figure:
    """The colours where the pixels are, and their places on the sphere in three colours."""
    figure, axes = _figures.canvas(2, 1 + len(_SHOWN), 15, 6.5)
    above, below = axes[: 1 + len(_SHOWN)], axes[1 + len(_SHOWN) :]
    _figures.show(above[0], pixels.photo, "photograph")
    below[0].set_axis_off()
    below[0].text(1, 0.5, _LEGEND, ha="right", va="center", fontsize=10, transform=below[0].transAxes)
    height, width = pixels.photo.shape[1:]
    projected = three_colours(pixels.iterates[list(_SHOWN)])
    for column, iteration in enumerate(_SHOWN):
        title = f"after {iteration} iterations" if iteration else "before mean shift"
        colours = colours_at(pixels.iterates[iteration])
        _figures.show(above[1 + column], colours.T.reshape(3, height, width), title)
        _figures.show(below[1 + column], projected[column].T.reshape(3, height, width), "")
    file = _figures.save(figure, settings.output, "mean_shift-iterations.png")
    return Figure(
        file,
        "Pixels climb to the modes of their density",
        f"Each of {height * width:,} pixels is a point on the unit sphere that stands for its colour and its "
        "place in the picture, and moves to the mean of all points, weighted by a Gaussian kernel around "
        "itself. Above, the colour that belongs to the point's position: noise and shading go first, then "
        "whole areas end in one point. Below, the same positions with the place in the picture in them: the "
        "three directions in which the points before mean shift differ most are red, green and blue. "
        f"Photograph: {CREDITS[_PHOTO]}.",
    )


def three_colours(points: Tensor) -> Tensor:
    """Sets of points [T, N, D] as colours [T, N, 3]: the principal components of the first set."""
    first = points[0].double()
    centre = first.mean(0)
    _, vectors = torch.linalg.eigh((first - centre).T @ (first - centre))  # ascending
    axes = vectors[:, -3:].flip(1)
    axes = axes * axes.sum(0).sign()  # the sign is the library's choice otherwise
    projected = (points.double() - centre) @ axes
    low, high = (projected[0].quantile(share, 0) for share in (0.01, 0.99))
    colours: Tensor = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    return colours


# ------------------------------------------------------------------------------------------ segments


def picture_segments(settings: Settings, pixels: Pixels) -> Figure:
    """Outlines and mean colours of the segments for three kernels."""
    figure, axes = _figures.canvas(2, len(_KAPPAS), 11.5, 8)
    for column, (name, kappa) in enumerate(_KAPPAS.items()):
        modes = pixels.iterates[-1]
        if kappa != KAPPA:
            modes = mean_shift(pixels.iterates[0], kappa, iterations=max(_SHOWN))
        labels = assign_modes(modes, threshold(kappa), _SMALLEST).view(pixels.photo.shape[1:])
        title = f"{name}, kappa {kappa:g}: {int(labels.max()) + 1} segments"
        _figures.show(axes[column], _outlined(pixels.sharp, labels.cpu()), title)
        _figures.show(axes[len(_KAPPAS) + column], mean_colours(pixels.photo, labels), "")
    file = _figures.save(figure, settings.output, "mean_shift-segments.png")
    return Figure(
        file,
        "Segments for three kernels",
        f"Pixels whose modes are linked, by assign_modes, are a segment. Above their outlines, below their "
        f"mean colours; pixels of segments smaller than {_SMALLEST} are white. Places count little here, so "
        "that a segment may have several parts, like the black or the white ones. The larger kappa, the "
        "narrower the kernel and the more segments.",
    )


def mean_colours(photo: Tensor, labels: Tensor) -> Tensor:
    """Every segment in its mean colour, what has no label in white."""
    colours, index = photo.flatten(1).T, labels.flatten() + 1
    count = int(index.max()) + 1
    sums = colours.new_zeros(count, 3).index_add_(0, index, colours)
    means = sums / index.bincount(minlength=count).clamp(min=1)[:, None]
    means[0] = 1
    return means[index].T.reshape(photo.shape)


def _outlined(photo: Tensor, labels: Tensor) -> Tensor:
    """The photograph with yellow lines where the label changes."""
    large = F.interpolate(labels[None, None].float(), size=photo.shape[1:], mode="nearest")[0, 0]
    edges = torch.zeros_like(large, dtype=torch.bool)
    edges[1:] |= large[1:] != large[:-1]
    edges[:, 1:] |= large[:, 1:] != large[:, :-1]
    return torch.where(edges, _OUTLINE[:, None, None], photo)


# ------------------------------------------------------------------------------------------ times


def picture_costs(
    settings: Settings,
    times: Mapping[str, Mapping[int, float]],
    memory: Mapping[str, int | None],
    points: int,
) -> Figure:
    """Milliseconds over the number of pixels, and the memory that each program needs."""
    figure, (left, right) = _figures.canvas(1, 2, 13, 4.4)
    colours: Sequence[str] = (_figures.EFFOPS_COLOUR, "#7f7f7f", "#e08e0b", "#8c3b3b")
    for (name, seconds), colour in zip(times.items(), colours, strict=False):
        left.plot(list(seconds), [1e3 * value for value in seconds.values()], "o-", color=colour, label=name)
    left.set_xscale("log")
    left.set_yscale("log")
    sizes = sorted({count for seconds in times.values() for count in seconds})
    left.set_xticks(sizes, [f"{size:,}" for size in sizes])
    left.minorticks_off()
    left.set_xlabel("pixels")
    left.set_ylabel("milliseconds, logarithmic scale", fontsize=9)
    left.set_title("time, 10 iterations", fontsize=10)
    left.legend(frameon=False, fontsize=9)

    known = {name: size / 2**20 for name, size in memory.items() if size is not None}
    bars = right.barh(list(known), list(known.values()), color=_figures.PLAIN_COLOUR)
    for bar, name in zip(bars, known, strict=True):
        if name.startswith("effops"):
            bar.set_color(_figures.EFFOPS_COLOUR)
        elif name.startswith("scikit-learn"):
            bar.set_color(colours[-1])
    right.bar_label(bars, [f" {size:.1f} MiB" for size in known.values()], fontsize=9)
    right.margins(x=0.2)
    right.invert_yaxis()
    right.set_xlabel("MiB at the peak, beyond the input")
    right.set_title(f"memory, {points:,} pixels", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "mean_shift-costs.png")
    peer = (
        "scikit-learn's kernel is flat, with a radius of 2 bandwidths, and moves the centres of grid cells "
        "until they stand still; its time and that of effops hold the labels too. "
        if "scikit-learn" in times
        else "The time of effops holds the labels too. "
    )
    return Figure(
        file,
        "Times and memory on this machine",
        "One iteration is softmax attention of the points to themselves: scaled_dot_product_attention, with "
        "numbers too small for float32's usual format flushed to zero, as they slow it down. N x N: the "
        "matrix of kernel values, its row sums and the product with the points. "
        f"{peer}All on one thread. Memory as the operating system counts it, exact to half a mebibyte; with "
        "gradients PyTorch keeps the N x N matrices of all iterations, effops the positions.",
    )
