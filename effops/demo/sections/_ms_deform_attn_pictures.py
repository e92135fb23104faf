"""Pictures of multi-scale deformable attention at work on photographs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import ms_deform_attn
from effops.demo import _figures
from effops.demo._photos import CREDITS, STRIDES, Pyramid, load, make_pyramid
from effops.demo._section import Figure, Settings
from effops.nn import MultiScaleDeformableAttention

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Queries on the photograph "chelsea": name, box (cx, cy, w, h) in parts of the photograph, colour.
_QUERIES = (
    ("eye", (0.385, 0.37, 0.17, 0.20), "#00b7c3"),
    ("nose", (0.592, 0.80, 0.16, 0.18), "#ffd500"),
    ("fur", (0.21, 0.20, 0.17, 0.26), "#ff5fa2"),
)


def pixel_centres(shape: tuple[int, int]) -> Tensor:
    """(x, y) in [0, 1] of every pixel of a map of (H, W) pixels, [H * W, 2]."""
    y, x = ((torch.arange(side) + 0.5) / side for side in shape)
    return torch.cartesian_prod(y, x).flip(1)


def picture_sampling_points(settings: Settings) -> list[Figure]:
    """Where three queries look, and what lies where the photograph looks alike."""
    pyramid = make_pyramid(load("chelsea", settings.photo_side))
    boxes = torch.tensor([box for _, box, _ in _QUERIES])
    locations = _points_of_boxes(boxes)
    weights = _similarity_weights(pyramid, boxes, locations, settings.device)

    figure, axes = _figures.canvas(2, 2, 11, 6.9)
    width, height = pyramid.size
    for level, (axis, colour) in enumerate(zip(axes, pyramid.colours, strict=True)):
        rows, columns = pyramid.shapes[level]
        title = f"level {level}, stride {STRIDES[level]}: {columns} x {rows} pixels"
        _figures.show(axis, colour * 0.75, title, (width, height), interpolation="nearest")
        for query, (name, _, edge) in enumerate(_QUERIES):
            _draw_box(axis, boxes[query], (width, height), edge, name if level == 0 else "")
            weight = weights[query, :, level].flatten()
            xy = locations[query, :, level].reshape(-1, 2) * torch.tensor([width, height])
            order = weight.argsort()
            points = axis.scatter(
                xy[order, 0].tolist(),
                xy[order, 1].tolist(),
                c=weight[order].tolist(),
                s=(12 + 260 * weight[order]).tolist(),
                cmap="inferno",
                vmin=0,
                vmax=float(weights.max()),
                edgecolors=edge,
                linewidths=0.8,
            )
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
    figure.colorbar(points, ax=axes, label="attention weight", shrink=0.6)
    file = _figures.save(figure, settings.output, "ms_deform_attn-points.png")
    points_figure = Figure(
        file,
        "Where three queries look",
        "Each query has a reference box (eye, nose and fur of the cat). Its 8 heads read 4 points on each "
        "of 4 levels, placed by the module's formula and initial directions: 128 points a query. Here a "
        "point's weight is the softmax, within its head, of the similarity to the feature at the centre of "
        "the box, so points on the same kind of surface are bright and large, others dark and small. "
        f"Photograph: {CREDITS['chelsea']}.",
    )
    return [points_figure, _picture_similarity(settings, pyramid, boxes)]


def _points_of_boxes(boxes: Tensor) -> Tensor:
    """Sampling locations [Q, M, L, P, 2] of a new module: centre + offset / P * (w, h) / 2."""
    layer = MultiScaleDeformableAttention()
    offsets = layer.sampling_offsets.bias.detach().view(
        layer.num_heads, layer.num_levels, layer.num_points, 2
    )
    centre, size = boxes[:, None, None, None, :2], boxes[:, None, None, None, 2:]
    return centre + offsets / layer.num_points * size * 0.5


def _similarity_weights(pyramid: Pyramid, boxes: Tensor, locations: Tensor, device: str) -> Tensor:
    """Attention weights [Q, M, L, P]: the op itself reads the single points, by weights of one 1 each."""
    queries, heads, levels, points, _ = locations.shape
    count = levels * points
    value = pyramid.value.to(device)
    one_each = torch.eye(count).view(count, 1, levels, points).expand(count, heads, levels, points)

    def read(where: Tensor) -> Tensor:  # [Q, M, L, P, 2] -> [Q, L * P, M, D]
        where = where[:, None].expand(-1, count, -1, -1, -1, -1).flatten(0, 1)[None].to(device)
        weights = one_each.repeat(queries, 1, 1, 1)[None].to(device)
        sampled = ms_deform_attn(value, pyramid.shapes, None, where, weights)
        return sampled.view(queries, count, heads, -1).cpu()

    at_points = F.normalize(read(locations), dim=-1)
    at_centre = F.normalize(read(boxes[:, None, None, None, :2].expand_as(locations)), dim=-1)
    similarity = (at_points * at_centre.mean(1, keepdim=True)).sum(-1)  # [Q, L * P, M]
    return (6 * similarity).softmax(1).transpose(1, 2).reshape(queries, heads, levels, points)


def _draw_box(axis: Axes, box: Tensor, size: tuple[int, int], colour: str, name: str) -> None:
    from matplotlib.patches import Rectangle

    cx, cy, w, h = (box * torch.tensor([*size, *size])).tolist()
    axis.add_patch(Rectangle((cx - w / 2, cy - h / 2), w, h, fill=False, edgecolor=colour, linewidth=1.6))
    axis.text(cx - w / 2, cy - h / 2 - 3, name, color=colour, fontsize=10, fontweight="bold")


def _picture_similarity(settings: Settings, pyramid: Pyramid, boxes: Tensor) -> Figure:
    """Every pixel of every level is a query; then each pixel is compared with the three chosen places."""
    layer = MultiScaleDeformableAttention()
    offsets = layer.sampling_offsets.bias.detach().view(8, 4, 4, 2)
    sizes = torch.tensor([(columns, rows) for rows, columns in pyramid.shapes])
    centres = torch.cat([pixel_centres(shape) for shape in pyramid.shapes])
    locations = centres[:, None, None, None] + offsets / sizes[:, None]
    weights = torch.full(locations.shape[:-1], 1 / 16)
    inputs = [tensor[None].to(settings.device) for tensor in (locations, weights)]
    context = ms_deform_attn(pyramid.value.to(settings.device), pyramid.shapes, None, *inputs)[0].cpu()

    rows, columns = pyramid.shapes[0]
    features = context[: rows * columns]
    features = F.normalize(features - features.mean(0), dim=-1)
    figure, axes = _figures.canvas(1, 3, 13, 3.1)
    for axis, (name, box, edge) in zip(axes, _QUERIES, strict=True):
        x, y = int(box[0] * columns), int(box[1] * rows)
        likeness = (features @ features[y * columns + x]).view(rows, columns)
        grey = pyramid.photo.mean(0).expand(3, -1, -1) * 0.6
        _figures.show(axis, grey, f"like the {name}", pyramid.size)
        shown = _figures.show(
            axis, likeness.clamp(min=0), f"like the {name}", pyramid.size,
            cmap="inferno", vmin=0, vmax=1, alpha=0.75, interpolation="bilinear",
        )  # fmt: skip
        _draw_box(axis, torch.tensor(box), pyramid.size, edge, "")
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    file = _figures.save(figure, settings.output, "ms_deform_attn-similarity.png")
    return Figure(
        file,
        "What looks alike after one pass over all pixels",
        f"All {len(centres):,} pixels of the four levels are queries, as in an encoder, and collect their "
        "surroundings at four scales. Each map compares every pixel with the middle of one box: the other "
        "eye should light up for the eye, and fur for fur.",
    )


def picture_swirl(settings: Settings) -> Figure:
    """The op as an image resampler against SciPy, an independent program.

    Raises:
        RuntimeError: the two disagree.
    """
    import numpy as np
    from scipy.ndimage import map_coordinates  # type: ignore[import-untyped]

    photo = load("rocket", settings.photo_side)
    shape = (photo.shape[1], photo.shape[2])
    where = _swirl(pixel_centres(shape))

    def ours(dtype: torch.dtype) -> Tensor:
        value = photo.flatten(1).t()[None, :, None].to(settings.device, dtype)
        locations = where[None, :, None, None, None].to(settings.device, dtype)
        weights = torch.ones_like(locations[..., 0])
        return ms_deform_attn(value, [shape], None, locations, weights)[0].t().view_as(photo).cpu()

    coordinates = (where.double() * torch.tensor([shape[1], shape[0]]) - 0.5).flip(1).t().numpy()
    channels = [
        map_coordinates(channel, coordinates, order=1, mode="grid-constant")
        for channel in photo.double().numpy()
    ]
    theirs = torch.tensor(np.stack(channels)).view_as(photo)
    single = ours(torch.float32)
    difference = (single - theirs).abs().amax(0)
    exactness = float((ours(torch.float64) - theirs).abs().max())
    if not (difference.max() < 1e-3 and exactness < 1e-12):
        raise RuntimeError(f"effops demo: the swirl differs from SciPy's by {exactness:.1e} in float64")

    figure, axes = _figures.canvas(1, 4, 15, 2.9)
    _figures.show(axes[0], photo, "photograph")
    _figures.show(axes[1], single, "effops.ms_deform_attn, float32")
    _figures.show(axes[2], theirs, "scipy.ndimage.map_coordinates, float64")
    shown = _figures.show(axes[3], difference, "absolute difference", cmap="magma", vmin=0)
    figure.colorbar(shown, ax=axes[3], shrink=0.75)
    file = _figures.save(figure, settings.output, "ms_deform_attn-swirl.png")
    caption = (
        "With one head, one level, one point and weight 1 the op is a bilinear image resampler. It turns the "
        "photograph into the same swirl as an independent program. Colours are in 0 to 1: the largest "
        f"difference is {float(difference.max()):.1e} in float32 (the rounding of the coordinates) and "
        f"{exactness:.1e} in float64. Photograph: {CREDITS['rocket']}."
    )
    return Figure(file, "A swirl, against SciPy", caption)


def _swirl(xy: Tensor) -> Tensor:
    """Turns points around the middle, most in the middle and not at all from a radius of 0.48."""
    from_middle = xy - 0.5
    radius = from_middle.norm(dim=1)
    angle = 3.2 * (1 - radius / 0.48).clamp(min=0) ** 2
    cos, sin = angle.cos(), angle.sin()
    x, y = from_middle.unbind(1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], 1) + 0.5


def picture_learning(settings: Settings) -> Figure:
    """The module learns where to look: nothing tells it but gradients at its sampling locations."""
    task = _Rotation(load("coffee", settings.photo_side), settings.device)
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(task.width, 4, 4, 2).to(settings.device)
    before = task.draw(layer)
    losses = task.learn(layer, settings.learning_steps)
    last = sum(losses[-20:]) / len(losses[-20:])
    after = task.draw(layer)

    figure, axes = _figures.canvas(1, 4, 14, 3.0)
    _figures.show(axes[0], before, "before")
    _figures.show(axes[1], after, f"after {settings.learning_steps} steps")
    _figures.show(axes[2], task.goal_image(), "goal: turned by 15 degrees")
    axes[3].plot(losses, color=_figures.EFFOPS_COLOUR, linewidth=1)
    axes[3].set_ylim(bottom=0)
    axes[3].set_xlabel("step")
    axes[3].set_title("mean squared error", fontsize=10)
    axes[3].spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "ms_deform_attn-learning.png")
    return Figure(
        file,
        "A layer that learns where to look",
        "effops.nn.MultiScaleDeformableAttention gets a query that knows only its own place, and must answer "
        "with the colour that the photograph has after a turn by 15 degrees. The only way to learn that is "
        "through the gradients of the sampling locations (coarse levels for the far way, fine ones for "
        f"detail) and of the weights. The error fell from {losses[0]:.3f} to {last:.4f}. "
        f"Photograph: {CREDITS['coffee']}.",
    )


class _Rotation:
    """The task of `picture_learning`: colours of a photograph that is turned around its middle."""

    width = 32  # channels of query, value and output; the first three are used
    angle = math.radians(15)

    def __init__(self, photo: Tensor, device: str) -> None:
        self.device = device
        pyramid = make_pyramid(photo)
        self.shapes = pyramid.shapes
        self.size = torch.tensor(pyramid.size, device=device)
        self.mean = photo.mean((1, 2)).to(device)
        colours = torch.cat([colour.flatten(1).t() for colour in pyramid.colours]).to(device)
        self.value = F.pad(colours - self.mean, (0, self.width - 3))[None]

    def goal(self, xy: Tensor) -> Tensor:
        """Colours [Q, 3] (minus the mean) at the places xy [Q, 2] of the turned photograph."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = ((xy - 0.5) * self.size).unbind(1)
        source = torch.stack([cos * x - sin * y, sin * x + cos * y], 1) / self.size + 0.5
        height, width = self.shapes[0]
        finest = self.value[:, : height * width, None, :3].contiguous()
        ones = torch.ones(1, len(xy), 1, 1, 1, device=self.device)
        return ms_deform_attn(finest, self.shapes[:1], None, source[None, :, None, None, None], ones)[0]

    def answer(self, layer: MultiScaleDeformableAttention, xy: Tensor) -> Tensor:
        """What the layer answers at xy, [Q, 3]; its query is (x, y, 1, 0, ..., 0)."""
        query = F.pad(torch.cat([2 * xy - 1, torch.ones_like(xy[:, :1])], 1), (0, self.width - 3))[None]
        reference = xy[None, :, None].expand(-1, -1, len(self.shapes), -1)
        answer: Tensor = layer(query, reference, self.value, self.shapes)
        return answer[0, :, :3]

    def learn(self, layer: MultiScaleDeformableAttention, steps: int) -> list[float]:
        """Adam on 1000 random places a step; returns the errors."""
        optimiser = torch.optim.Adam(layer.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, total_steps=steps, pct_start=0.1)
        losses = []
        for _ in range(steps):
            xy = torch.rand(1000, 2, device=self.device)
            loss = F.mse_loss(self.answer(layer, xy), self.goal(xy))
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    def draw(self, layer: MultiScaleDeformableAttention) -> Tensor:
        """The layer's answers at all pixels of the finest level, [3, H, W]."""
        with torch.no_grad():
            return self._image(self.answer(layer, self._all_pixels()))

    def goal_image(self) -> Tensor:
        return self._image(self.goal(self._all_pixels()))

    def _all_pixels(self) -> Tensor:
        return pixel_centres(self.shapes[0]).to(self.device)

    def _image(self, colours: Tensor) -> Tensor:
        return (colours + self.mean).t().reshape(3, *self.shapes[0]).cpu()
