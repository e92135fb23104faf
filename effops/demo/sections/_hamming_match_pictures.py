"""Pictures of hamming_match between two views of a photograph, and of binnorm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effops import binnorm, hamming_match, topk_pack, unpack_bits
from effops.demo import _figures
from effops.demo._photos import CREDITS, load
from effops.demo._section import Figure, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATIO = 0.8
_PHOTO = "coffee"
_SMALLEST_SIDE = 240  # ORB describes nothing within 31 pixels of an edge
_CORNERS = ((0.31, 0.01), (0.97, 0.34), (0.73, 0.98), (0.04, 0.70))  # of the first view, in the second
_NOISE = 5 / 255
_REACH = 3.0  # pixels from its true place at which a match is right
_DRAWN = 80
_RIGHT_COLOUR, _WRONG_COLOUR = "#2ecc40", "#ff2d20"
_TESTS: dict[str, tuple[float | None, bool]] = {  # ratio and mutual
    "no test": (None, False),
    "mutual": (None, True),
    f"ratio {RATIO}": (RATIO, False),
    "both": (RATIO, True),
}

_ELEMENTS, _ONES = 48, 12
_SHARPNESS = (1, 5, 10, 20)
_BAR_COLOURS = {
    "effops": _figures.EFFOPS_COLOUR,
    "faiss": "#e08e0b",
    "OpenCV": "#5aa469",
    "plain PyTorch": _figures.PLAIN_COLOUR,
}


@dataclass(frozen=True)
class Views:
    """A photograph and its picture from elsewhere, with the keypoints that ORB finds in each.

    Attributes:
        photos: both, [3, H, W].
        points: (x, y) of the keypoints in pixels, [N, 2].
        descriptors: 256 bits of each keypoint as bytes, [N, 32]: OpenCV's own memory.
        places: where the first view's keypoints are in the second one, [N, 2].
    """

    photos: tuple[Tensor, Tensor]
    points: tuple[Tensor, Tensor]
    descriptors: tuple[Tensor, Tensor]
    places: Tensor

    def is_right(self, matches: Tensor) -> Tensor:
        """Which pairs [n, 2] are in the same place, [n]."""
        errors: Tensor = (self.places[matches[:, 0]] - self.points[1][matches[:, 1]]).norm(dim=1)
        return errors < _REACH


def make_views(settings: Settings) -> Views:
    """A photograph turned, tilted, made smaller and noisy, by a homography that is known."""
    import cv2
    import numpy as np

    photo = load(_PHOTO, max(settings.photo_side, _SMALLEST_SIDE))
    size = (photo.shape[2], photo.shape[1])
    before, after = (
        (np.array(corners) * size).astype(np.float32)
        for corners in (((0, 0), (1, 0), (1, 1), (0, 1)), _CORNERS)
    )
    homography = cv2.getPerspectiveTransform(before, after)
    warped = torch.from_numpy(cv2.warpPerspective(_figures.pixels(photo), homography, size)).permute(2, 0, 1)
    inside = cv2.warpPerspective(np.full((size[1], size[0]), 255, np.uint8), homography, size)
    noise = _NOISE * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    second = (warped + noise * torch.from_numpy(inside).bool()).clamp(0, 1)

    points, descriptors = zip(_orb(photo, None), _orb(second, inside), strict=True)
    places = cv2.perspectiveTransform(points[0].numpy()[:, None], homography)[:, 0]
    return Views((photo, second), points, descriptors, torch.from_numpy(places))


def _orb(photo: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """ORB's keypoints [N, 2] and their descriptors [N, 32], where the mask is not 0."""
    import cv2

    pixels = (255 * _figures.pixels(photo.mean(0))).astype("uint8")
    keypoints, descriptors = cv2.ORB.create(nfeatures=20_000).detectAndCompute(pixels, mask)
    return torch.tensor([keypoint.pt for keypoint in keypoints]), torch.from_numpy(descriptors)


def picture_matches(settings: Settings, views: Views) -> Figure:
    """Matches between both views, by the tests they passed: green where they are right."""
    a, b = (tensor.to(settings.device) for tensor in views.descriptors)
    both = torch.cat(views.photos, 2).mean(0)  # grey and dark, so that the colours of the lines can be seen
    height, width = both.shape
    figure, axes = _figures.canvas(2, 2, 14, 14 * height / width + 0.7)
    for axis, (name, (ratio, mutual)) in zip(axes, _TESTS.items(), strict=True):
        matches = hamming_match(a, b, ratio, mutual=mutual)[0].cpu()
        right = views.is_right(matches)
        share = float(right.float().mean())
        title = f"{name}: {len(matches):,} matches, {int(right.sum()):,} right ({share:.0%})"
        _figures.show(axis, both, title, cmap="gray", vmin=0, vmax=1.5)
        chosen = torch.randperm(len(matches), generator=torch.Generator().manual_seed(0))[:_DRAWN]
        _draw_matches(axis, views, matches[chosen], right[chosen])
    file = _figures.save(figure, settings.output, "hamming_match-views.png")
    return Figure(
        file,
        "The same cup, found again",
        f"The second view is the first one turned, tilted, made smaller and noisy. ORB describes {len(a):,} "
        f"and {len(b):,} keypoints by 256 bits each, and hamming_match pairs them. Without a test every "
        "keypoint gets its nearest one; mutual keeps pairs that are each other's nearest (OpenCV's "
        f"crossCheck), and ratio those that are at least a fifth nearer than the second nearest. {_DRAWN} "
        f"random matches of each kind are drawn: green ends within {_REACH:.0f} pixels of the place that the "
        f"known homography gives, red elsewhere. Photograph: {CREDITS[_PHOTO]}.",
    )


def _draw_matches(axis: Axes, views: Views, matches: Tensor, right: Tensor) -> None:
    """Lines from the first view to the second one, which is beside it."""
    from matplotlib.collections import LineCollection

    starts = views.points[0][matches[:, 0]]
    ends = views.points[1][matches[:, 1]] + torch.tensor([views.photos[0].shape[2], 0])
    lines = torch.stack([starts, ends], 1)
    for chosen, colour in ((~right, _WRONG_COLOUR), (right, _RIGHT_COLOUR)):
        axis.add_collection(
            LineCollection(list(lines[chosen].numpy()), colors=colour, linewidths=0.9, alpha=0.8),
            autolim=False,
        )


def picture_binnorm(settings: Settings) -> Figure:
    """One row of logits, made ever sharper, and the bits that it tends to."""
    x = torch.randn(_ELEMENTS, generator=torch.Generator().manual_seed(0)).to(settings.device)
    rows = {f"logits x {sharpness}": binnorm(sharpness * x, _ONES).cpu() for sharpness in _SHARPNESS}
    rows["topk_pack"] = unpack_bits(topk_pack(x, _ONES), _ELEMENTS).float().cpu()
    order = x.cpu().argsort(descending=True)

    figure, axes = _figures.canvas(1, 2, 13, 3.6)
    title = f"{_ELEMENTS} elements of a row; white 0, blue 1"
    _figures.show(axes[0], torch.stack(list(rows.values())), title, (_ELEMENTS, 20), cmap="Blues", vmin=0)
    axes[0].set_aspect("auto")
    height = 20 / len(rows)
    sums = [f"{name}\nsum {float(row.double().sum()):.4f}" for name, row in rows.items()]
    axes[0].set_yticks([(index + 0.5) * height for index in range(len(rows))], sums, fontsize=9)
    for index in range(1, len(rows)):
        axes[0].axhline(index * height, color="white", linewidth=4)
    colours = ["#b5d3ea", "#6faed6", "#2f7ebc", "#0a4a90", "#e08e0b"]
    for (name, row), colour in zip(rows.items(), colours, strict=True):
        axes[1].step(range(1, _ELEMENTS + 1), row[order].numpy(), where="mid", label=name, color=colour)
    axes[1].set_title("the same, the largest logit first", fontsize=10)
    axes[1].set_xlabel("rank of the logit")
    axes[1].set_ylabel("value")
    axes[1].legend(frameon=False, fontsize=9)
    axes[1].spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "hamming_match-binnorm.png")
    return Figure(
        file,
        f"Numbers that sum to {_ONES}, and {_ONES} ones",
        "Binary descriptors are learnt with binnorm, sigma(x + nu): its nu is such that each row sums to k, "
        f"here {_ONES}. The logits times 1, 5, 10 and 20 (inverse temperatures) tend to the descriptor that "
        "topk_pack packs: ones for the k largest logits.",
    )


def picture_times(settings: Settings, times: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars of milliseconds for each kind of match and program, with the numbers and ratios beside them."""
    figure, (axes,) = _figures.canvas(1, 1, 9, 0.9 + 0.32 * sum(len(peers) + 1 for peers in times.values()))
    position, ticks = 0.0, []
    for peers in times.values():
        ticks.append(position + (len(peers) - 1) / 2)
        for name, seconds in peers.items():
            axes.barh(position, seconds * 1e3, 0.8, color=_BAR_COLOURS[name])
            ratio = "" if name == "effops" else f", {seconds / peers['effops']:.1f}x"
            text = f" {name}: {seconds * 1e3:.1f} ms{ratio}"
            axes.text(seconds * 1e3, position, text, va="center", fontsize=9)
            position += 1
        position += 0.7
    axes.set_yticks(ticks, list(times))
    axes.invert_yaxis()
    axes.set_xscale("log")
    all_times = [seconds * 1e3 for peers in times.values() for seconds in peers.values()]
    axes.set_xlim(min(all_times) / 4, max(all_times) * 12)  # room for the text
    axes.set_xlabel("milliseconds, logarithmic scale (shorter is better)")
    axes.spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "hamming_match-times.png")
    faiss = " faiss' knn_hamming searches in both directions for mutual, and for two neighbours for ratio."
    return Figure(
        file,
        "Times on this machine, one thread each",
        "Shortest of several runs, the programs taking turns. OpenCV is BFMatcher: with crossCheck, and "
        "knnMatch with the ratio test in Python. Plain PyTorch multiplies descriptors of +1 and -1, which "
        "gives all distances, and looks for the nearest ones."
        + (faiss if any("faiss" in peers for peers in times.values()) else "")
        + (" effops and plain PyTorch run on the GPU." if settings.device == "cuda" else ""),
    )
