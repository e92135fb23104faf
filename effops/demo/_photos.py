"""Photographs that scikit-image ships, and feature pyramids made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Photographs in the package itself (nothing is downloaded), with their authors. All are free to use: CC0,
#: in the public domain, or without known restrictions.
CREDITS = {
    "astronaut": "Eileen Collins, by NASA, public domain",
    "chelsea": "Chelsea the cat, by Stefan van der Walt, CC0",
    "coffee": "Pikolo Espresso Bar, by Rachel Michetti, CC0",
    "coins": "Greek coins from Pompeii, Brooklyn Museum, no known copyright restrictions",
    "rocket": "launch of DSCOVR on a Falcon 9, by SpaceX, public domain",
}

STRIDES = (4, 8, 16, 32)


def load(name: str, longest_side: int) -> Tensor:
    """Photograph `name`, [3, H, W] in [0, 1], reduced to at most `longest_side` pixels."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)())
    if pixels.dim() == 2:  # grey
        pixels = pixels[:, :, None].expand(-1, -1, 3)
    photo = pixels.permute(2, 0, 1).float() / 255
    scale = longest_side / max(photo.shape[1:])
    if scale >= 1:
        return photo
    size = [max(1, round(side * scale)) for side in photo.shape[1:]]
    return F.interpolate(photo[None], size=size, mode="area")[0]


def psnr(picture: Tensor, photo: Tensor) -> float:
    """Peak signal-to-noise ratio of a picture in decibels: more is closer to the photograph."""
    return float(-10 * F.mse_loss(picture.clamp(0, 1), photo).log10())


@dataclass(frozen=True)
class Pyramid:
    """Feature maps of one photograph at strides 4, 8, 16 and 32.

    Attributes:
        photo: [3, H, W]
        colours: the photograph at each stride, [3, H_l, W_l].
        shapes: (H_l, W_l) of each level.
        value: features of all levels, [1, S, M, D].
    """

    photo: Tensor
    colours: list[Tensor]
    shapes: list[tuple[int, int]]
    value: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(W, H) of the photograph."""
        return self.photo.shape[2], self.photo.shape[1]


def make_pyramid(photo: Tensor, heads: int = 8, channels: int = 32) -> Pyramid:
    """Colour, gradients and oriented texture at four scales, mixed into heads by a fixed random matrix."""
    colours, rows = [], []
    for stride in STRIDES:
        size = [math.ceil(side / stride) for side in photo.shape[1:]]
        colour = F.interpolate(photo[None], size=size, mode="area")[0]
        colours.append(colour)
        rows.append(_features(colour).flatten(1).t())
    features = torch.cat(rows)
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(features.shape[1], heads * channels, generator=generator)
    value = (features @ mixing) / math.sqrt(features.shape[1])
    shapes = [(colour.shape[1], colour.shape[2]) for colour in colours]
    return Pyramid(photo, colours, shapes, value.view(1, -1, heads, channels))


def _features(colour: Tensor) -> Tensor:
    """[11, H, W]: three colour axes, gradient and its length, local contrast, four oriented energies."""
    red, green, blue = colour
    grey = (red + green + blue) / 3
    axes = [grey, red - green, (red + green) / 2 - blue]
    down, across = torch.gradient(F.pad(grey, (1, 0, 1, 0)))
    down, across = down[1:, 1:], across[1:, 1:]
    contrast = (_blur(grey**2) - _blur(grey) ** 2).clamp(min=0).sqrt()
    energies = [_gabor_energy(grey, angle * math.pi / 4) for angle in range(4)]
    return torch.stack([*axes, across, down, (across**2 + down**2).sqrt(), contrast, *energies])


def _blur(image: Tensor) -> Tensor:
    return F.avg_pool2d(image[None], 5, stride=1, padding=2, count_include_pad=False)[0]


def _gabor_energy(image: Tensor, angle: float, wavelength: float = 4.0, radius: int = 4) -> Tensor:
    """Strength of stripes across `angle`: an even and an odd filter, squared and added."""
    grid = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * (radius / 2) ** 2))
    phase = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / wavelength)
    filters = torch.stack([window * phase.cos(), window * phase.sin()])
    filters = filters - filters.mean((1, 2), keepdim=True)
    padded = F.pad(image[None, None], [radius] * 4, mode="replicate")
    return F.conv2d(padded, filters[:, None])[0].square().sum(0).sqrt()
