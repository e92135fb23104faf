"""Pictures of pixel embeddings before and after training, of the groups in them and of the training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import assign_modes
from effops.demo import _figures
from effops.demo._section import Figure, Settings
from effops.demo.sections._mean_shift_pictures import three_colours
from effops.demo.sections._pairwise_embedding_loss_net import (
    CHANNELS,
    ITERATIONS,
    SIDE,
    SMALLEST,
    Scenes,
    Training,
    embed,
    score,
)
from effops.nn import MeanShiftGrouping

_SHOWN = 4  # pictures
_SHOWN_ITERATIONS = (0, 2, 10)


def picture_embeddings(settings: Settings, unseen: Scenes, training: Training) -> Figure:
    """Rows of pictures: truth, embedding before and after, its modes, and the labels."""
    some = Scenes(*(tensor[:_SHOWN] for tensor in unseen))
    grouping = MeanShiftGrouping(iterations=ITERATIONS, return_all=True)
    iterates = grouping(embed(training.network, some))  # [11, 4, CHANNELS, SIDE, SIDE]
    points = iterates.flatten(3).mT
    found = assign_modes(points[-1], min_size=SMALLEST).view(some.labels.shape)
    before = _colours(F.normalize(training.before[:_SHOWN], dim=1)[None])

    count = 5 + len(_SHOWN_ITERATIONS)
    figure, axes = _figures.canvas(_SHOWN, count, 2 * count, 2.15 * _SHOWN)
    for row in range(_SHOWN):
        line = axes[row * count : (row + 1) * count]
        after = _colours(iterates[list(_SHOWN_ITERATIONS), row][:, None])
        agreement = score(found[row], some.labels[row])
        untrained = before[0, row]
        panels = [
            ("picture", some.pictures[row]),
            (f"truth: {int(some.labels[row].max())} shapes", _label_colours(some.labels[row])),
            ("embedding, untrained", untrained),
            *((_title(iteration), after[index, 0]) for index, iteration in enumerate(_SHOWN_ITERATIONS)),
            (f"{int(found[row].max())} groups + background", _label_colours(found[row])),
            (f"where they differ; score {agreement:.2f}", _differences(found[row], some.labels[row])),
        ]
        for axis, (title, picture) in zip(line, panels, strict=True):
            is_own = title.startswith(("truth", "where")) or "groups" in title
            _figures.show(axis, picture, title if row == 0 or is_own else "", interpolation="nearest")
            axis.title.set_fontsize(8.5)
    file = _figures.save(figure, settings.output, "pairwise_embedding_loss-embeddings.png")
    return Figure(
        file,
        "Embeddings that tell like shapes apart",
        f"Pictures of {SIDE} x {SIDE} pixels that the network hasn't seen while it learnt. Shapes have two "
        f"colours, so that colour doesn't tell which is which. Each pixel has an embedding of {CHANNELS} "
        "channels, shown in three colours (the directions of largest variance). After "
        f"{len(training.losses)} steps pixels of a shape are alike and those of different shapes aren't; "
        "mean shift draws them together further, and assign_modes reads the labels off. Label colours go by "
        f"size; pixels in groups of fewer than {SMALLEST} are white. Score: adjusted Rand index of the "
        "pixels of shapes, 1 means the same groups. In the last column, pixels are black that aren't in the "
        "group of most of their shape, or whose group is mostly another shape.",
    )


def _title(iteration: int) -> str:
    return f"after {iteration} iterations" if iteration else "trained, 0 iterations"


def _colours(iterates: Tensor) -> Tensor:
    """[T, N, C, H, W] in the three colours of each picture's first iterate, [T, N, 3, H, W]."""
    points = iterates.flatten(3).mT  # [T, N, H W, C]
    colours = torch.stack([three_colours(points[:, image]) for image in range(points.shape[1])], 1)
    maps: Tensor = colours.mT.unflatten(3, iterates.shape[3:])
    return maps


def _label_colours(labels: Tensor) -> Tensor:
    """[3, H, W]: a colour for each label, from the colour map; -1 is white, 0 light grey."""
    from matplotlib import colormaps

    palette = torch.tensor(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    order = torch.cat([palette[0::2], palette[1::2]])
    colours = order[(labels.cpu() - 1) % len(order)]
    colours[labels.cpu() == 0] = 0.85
    colours[labels.cpu() < 0] = 1.0
    return colours.permute(2, 0, 1)


def _differences(found: Tensor, truth: Tensor) -> Tensor:
    """[3, H, W]: pixels black outside the main group of their shape, or the main shape of their group."""
    found, truth = found.cpu(), truth.cpu()
    wrong = _apart(found, truth) | _apart(truth, found)
    return (1 - 0.9 * wrong.float()).expand(3, -1, -1)


def _apart(labels: Tensor, groups: Tensor) -> Tensor:
    """Which pixels have another label than most of their group."""
    apart = torch.zeros_like(labels, dtype=torch.bool)
    for group in groups.unique():
        is_member = groups == group
        apart |= is_member & (labels != labels[is_member].mode().values)
    return apart


# ------------------------------------------------------------------------------------------ training


def picture_training(settings: Settings, training: Training) -> Figure:
    """The loss of each step, and the score of unseen pictures."""
    figure, (left, right) = _figures.canvas(1, 2, 11, 3.4)
    losses = torch.tensor(training.losses)
    window = max(1, min(15, len(losses) // 4))
    smooth = losses.unfold(0, window, 1).mean(1)
    left.plot(losses, color=_figures.PLAIN_COLOUR, linewidth=1, label="each step")
    left.plot(
        torch.arange(len(smooth)) + window // 2,
        smooth,
        color=_figures.EFFOPS_COLOUR,
        label=f"mean of {window} steps",
    )
    left.set_ylim(bottom=0)
    left.set_ylabel("pairwise_embedding_loss")
    left.legend(frameon=False, fontsize=9)
    right.plot(*zip(*training.scores, strict=True), "o-", color=_figures.EFFOPS_COLOUR)
    right.set_ylim(min(0.0, min(score for _, score in training.scores)) - 0.05, 1.02)
    right.set_ylabel("score of unseen pictures")
    for axis in (left, right):
        axis.set_xlabel("steps")
        axis.spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "pairwise_embedding_loss-training.png")
    return Figure(
        file,
        "Training",
        "Left the loss, right how well mean shift separates the shapes of pictures that the network doesn't "
        "learn from: the mean adjusted Rand index of the pixels of shapes, 0 for groups by chance, 1 for the "
        "true shapes.",
    )


# ------------------------------------------------------------------------------------------ costs


def picture_costs(
    settings: Settings, times: Mapping[str, Mapping[int, float]], memory: Mapping[str, Mapping[int, int]]
) -> Figure:
    """Milliseconds and mebibytes over the number of points."""
    figure, (left, right) = _figures.canvas(1, 2, 11, 3.6)
    for axis, title, curves, scale in (
        (left, "milliseconds, loss and gradients", times, 1e3),
        (right, "MiB at the peak, beyond the input", memory, 2.0**-20),
    ):
        sizes = sorted({size for values in curves.values() for size in values})
        styles = (("o-", _figures.EFFOPS_COLOUR), ("s-", "#7f7f7f"))
        for (name, values), (style, colour) in zip(curves.items(), styles, strict=True):
            heights = [max(value * scale, 1e-2) for value in values.values()]
            axis.plot(list(values), heights, style, color=colour, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("pixels")
        axis.set_title(title, fontsize=10)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    file = _figures.save(figure, settings.output, "pairwise_embedding_loss-costs.png")
    return Figure(
        file,
        "Times and memory on this machine",
        "One picture's loss with its gradients, on one thread, for embeddings of the trained network. Plain "
        "PyTorch holds several matrices of all pairs of pixels; the op holds none. Memory is exact to half a "
        "mebibyte, as the operating system counts it.",
    )
