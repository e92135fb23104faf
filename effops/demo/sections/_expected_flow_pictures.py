"""Pictures of a photograph that moves, by filters that stand for a flow, and of the flow found again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import expected_flow, filter_flow, local_attention, neighborhood_dot
from effops.demo import _figures
from effops.demo._photos import CREDITS, load, psnr
from effops.demo._section import Figure, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = 11
_RADIUS = WINDOW // 2
_PHOTO, _LONGEST = "astronaut", 256
_FASTEST = 4.0  # pixels of the longest displacement
_NOISE = 0.02  # standard deviation, in the moved picture only

_PATCH, _SUPPORT = 5, 15  # sides of the patches compared, and of the areas that costs are averaged over
_LEAST_CONTRAST = 0.02  # patches of less are compared as if they had about this much
SHARPNESS = 60.0  # of the softmax over matching costs

_FACE = (0.05, 0.41, 0.25, 0.61)  # top, bottom, left and right in parts of the photograph


@dataclass(frozen=True)
class Motion:
    """A photograph, and the same moved: pixel p of the second picture shows p + flow(p) of the first.

    Attributes:
        photo, moved: [1, 3, H, W]; moved without noise.
        second: moved, with noise.
        flow: (dx, dy) in pixels, [1, 2, H, W].
        filters: the flow as bilinear weights, [1, K * K, H, W].
        queries, keys: features of the patches around the pixels of the second and the first picture, grey:
            their product is (1 - the squared distance) / 2, apart from patches of little contrast.
    """

    photo: Tensor
    moved: Tensor
    second: Tensor
    flow: Tensor
    filters: Tensor
    queries: Tensor
    keys: Tensor


def make_motion(settings: Settings) -> Motion:
    photo = load(_PHOTO, min(settings.photo_side, _LONGEST))[None].to(settings.device)
    flow = _swirl(*photo.shape[2:]).to(photo)
    filters = bilinear_filters(flow, WINDOW)
    moved = cast(Tensor, filter_flow(photo, filters, normalize="none", padding_mode="replicate"))
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0)).to(photo)
    second = (moved + _NOISE * noise).clamp(0, 1)
    queries, keys = _features(second), _features(photo)
    squares = keys.square().sum(1, keepdim=True)
    queries = torch.cat([queries, torch.ones_like(squares)], 1)
    return Motion(photo, moved, second, flow, filters, queries, torch.cat([keys, -squares / 2], 1))


def bilinear_filters(flow: Tensor, kernel: int) -> Tensor:
    """Weights of the up to four pixels around p + flow(p), [N, K * K, H, W], of a flow within the window."""
    taps = torch.arange(kernel, device=flow.device)[:, None, None] - kernel // 2
    across, down = ((1 - (flow[:, axis, None] - taps).abs()).clamp(min=0) for axis in (0, 1))
    return (down[:, :, None] * across[:, None]).flatten(1, 2)


def warp_by_grid_sample(photo: Tensor, flow: Tensor) -> Tensor:
    """The pixels at p + flow(p), in plain PyTorch; outside the photograph its border goes on."""
    height, width = photo.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y], -1).to(flow) + flow.permute(0, 2, 3, 1)
    last = torch.tensor([width - 1, height - 1]).to(flow)
    grid = 2 * places / last - 1
    return F.grid_sample(photo, grid, align_corners=True, padding_mode="border")


def _swirl(height: int, width: int) -> Tensor:
    """A turn and some scaling around the middle, [1, 2, H, W]; little at the border."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    flow = torch.stack([0.6 * x - y, x + 0.6 * y]) * torch.exp(-2 * (x**2 + y**2))
    longest = float(flow.norm(dim=0).max())
    return flow[None] * (_FASTEST / longest)


def _features(picture: Tensor) -> Tensor:
    """The grey patch around each pixel without its mean, of length 1 or, of little contrast, less."""
    height, width = picture.shape[2:]
    grey = F.pad(picture.mean(1, keepdim=True), [_PATCH // 2] * 4, mode="replicate")
    patches = F.unfold(grey, _PATCH).view(1, -1, height, width)
    patches = patches - patches.mean(1, keepdim=True)
    return patches / (patches.square().sum(1, keepdim=True) + (_PATCH * _LEAST_CONTRAST) ** 2).sqrt()


# ------------------------------------------------------------------------------------------ known flow


def picture_known(settings: Settings, motion: Motion) -> Figure:
    """A flow as filters, the picture they move, and the flow read off them."""
    height, width = motion.photo.shape[2:]
    sampled = warp_by_grid_sample(motion.photo, motion.flow)
    difference = float((motion.moved - sampled).abs().max())
    found = expected_flow(motion.filters, normalize="none")
    error = float((found - motion.flow).norm(dim=1).max())

    figure, axes = _figures.canvas(1, 4, 15, 4.2)
    _figures.show(axes[0], motion.photo[0], "photograph, and where it goes")
    _draw_arrows(axes[0], motion.flow[0])
    _figures.show(axes[1], motion.moved[0], "moved by filter_flow")
    _show_flow(axes[2], motion.flow[0], "flow that the filters were made of")
    _draw_wheel(axes[2])
    _show_flow(axes[3], found[0], f"expected_flow of the filters: off by {error:.0e} pixels")
    file = _figures.save(figure, settings.output, "expected_flow-known.png")
    return Figure(
        file,
        "A flow is a filter for every pixel",
        f"Bilinear interpolation at p + flow(p), as weights in a window of {WINDOW} x {WINDOW}: it has room "
        f"for any displacement up to {_RADIUS} pixels; here the longest has {_FASTEST:.0f}, on {width} x "
        f"{height} pixels. filter_flow with these weights moves the photograph as grid_sample does, up to "
        f"{difference:.0e}. expected_flow, the mean displacement of a filter, gives the flow back, and for "
        "filters that a network predicts it says in the same way how things move. Colours: direction by the "
        f"wheel, stronger for longer. Arrows: four times their length. Photograph: {CREDITS[_PHOTO]}.",
    )


# ------------------------------------------------------------------------------------------ matching


def matching_filters(motion: Motion, support: int) -> Tensor:
    """Logits from costs of matching, averaged over support x support pixels."""
    similarities: Tensor = neighborhood_dot(motion.queries, motion.keys, WINDOW)
    for sides in ((support, 1), (1, support)):
        margins = [side // 2 for side in sides]
        similarities = F.avg_pool2d(similarities, sides, 1, margins, count_include_pad=False)
    return SHARPNESS * similarities


def picture_matching(settings: Settings, motion: Motion) -> Figure:
    """The flow found by matching patches, without and with averaged costs."""
    figure, axes = _figures.canvas(2, 3, 13, 8.4)
    errors = {}
    _show_flow(axes[0], motion.flow[0], "true flow")
    _draw_wheel(axes[0])
    _figures.show(axes[3], motion.second[0], "second picture, with noise")
    for column, (name, support) in enumerate((("single patches", 1), ("averaged costs", _SUPPORT)), 1):
        found = expected_flow(matching_filters(motion, support))
        error = (found - motion.flow).norm(dim=1)[0]
        errors[name] = error.mean(), error.median()
        _show_flow(axes[column], found[0], f"found, {name}")
        title = f"error, {name}: mean {float(error.mean()):.2f} pixels"
        shown = _figures.show(axes[3 + column], error, title, cmap="inferno", vmin=0, vmax=_FASTEST)
    figure.colorbar(shown, ax=axes[5], label="pixels between true and found flow", shrink=0.9)
    file = _figures.save(figure, settings.output, "expected_flow-matching.png")
    medians = " and ".join(f"{float(median):.2f}" for _, median in errors.values())
    return Figure(
        file,
        "The flow found by matching",
        f"neighborhood_dot compares the grey {_PATCH} x {_PATCH} patch around each pixel of the second "
        f"picture with the {WINDOW} x {WINDOW} patches around the same place in the first; expected_flow "
        "takes the softmax and the mean displacement. It favours whole pixels, where the patches are "
        "compared. In even areas nothing can be matched, but costs averaged over "
        f"{_SUPPORT} x {_SUPPORT} pixels bring the match from beside. Median errors: {medians} pixels. "
        "Nothing is learnt here.",
    )


# ------------------------------------------------------------------------------------------ colours


def picture_colours(settings: Settings, motion: Motion) -> Figure:
    """The second picture in grey takes its colours from the first."""
    grey = motion.second.mean(1, keepdim=True)
    colours = motion.photo - motion.photo.mean(1, keepdim=True)
    brought = local_attention(motion.queries, motion.keys, colours, WINDOW, scale=SHARPNESS)
    panels = (
        ("first picture", motion.photo, False),
        ("second picture, grey", grey.expand(-1, 3, -1, -1), True),
        ("with the colours at the same places", grey + colours, True),
        ("with those from local_attention", grey + brought, True),
        ("second picture", motion.moved, False),
    )
    figure, axes = _figures.canvas(2, len(panels), 16, 6.9)
    for index, (title, picture, is_compared) in enumerate(panels):
        if is_compared:
            title += f": {psnr(picture, motion.moved):.1f} dB"
        _figures.show(axes[index], picture[0], title)
        axes[index].title.set_fontsize(9)
        _figures.show(axes[len(panels) + index], _cut(picture[0]), "", interpolation="nearest")
    file = _figures.save(figure, settings.output, "local_attention-colours.png")
    return Figure(
        file,
        "Colours brought along by attention",
        "The second picture is grey, with noise. Each of its pixels attends to the window around the same "
        "place in the first picture, by the patches above, and takes the mean of the colours there. "
        f"local_attention does it in one pass and stores none of the {WINDOW} x {WINDOW} similarities. "
        "Decibels: peak signal-to-noise ratio against the second picture in colour, without noise.",
    )


def _cut(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    top, bottom, left, right = _FACE
    rows = slice(round(top * height), round(bottom * height))
    return image[:, rows, round(left * width) : round(right * width)]


# ------------------------------------------------------------------------------------------ flow in colours


def _show_flow(axis: Axes, flow: Tensor, title: str) -> None:
    _figures.show(axis, _colours_of(flow.cpu() / _FASTEST), title)


def _draw_arrows(axis: Axes, flow: Tensor) -> None:
    """From places of the photograph to where they go, nearly: against the flow. Four times the length."""
    step = max(flow.shape[1] // 16, 1)
    rows, columns = (torch.arange(step // 2, side, step) for side in flow.shape[1:])
    dx, dy = -flow.cpu()[:, rows[:, None], columns]
    axis.quiver(columns, rows, dx, dy, angles="xy", scale_units="xy", scale=0.25, color="white", width=0.005)


def _draw_wheel(axis: Axes) -> None:
    """The colours of all directions, in a corner."""
    steps = torch.linspace(-1, 1, 101)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    wheel = torch.cat([_colours_of(torch.stack([x, y])), (x**2 + y**2 <= 1)[None].float()])
    corner = axis.inset_axes((0.8, 0.02, 0.18, 0.18))
    corner.imshow(wheel.permute(1, 2, 0).numpy(), extent=(-1, 1, 1, -1))
    corner.axis("off")


def _colours_of(flow: Tensor) -> Tensor:
    """[2, H, W] as colours [3, H, W]: white for 0, full for a length of 1, the hue by the direction."""
    from matplotlib.colors import hsv_to_rgb

    hue = (torch.atan2(flow[1], flow[0]) / (2 * torch.pi)) % 1
    length = flow.norm(dim=0).clamp(max=1)
    colours = hsv_to_rgb(torch.stack([hue, length, torch.full_like(hue, 0.95)], -1).numpy())
    return torch.from_numpy(colours).permute(2, 0, 1).float()
