"""Coins of a photograph, and a small mask head after EffSeg that learns to outline them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops import SPS, point_sample, roi_align, sps_from_dense, sps_refine
from effops.demo._photos import load
from effops.nn import SPSFusion

PHOTO = "coins"
SIDES = (8, 16, 32, 64)  # cells of a map: the coarse one and those of the three stages
STRIDES = (1, 2, 4, 8)
REFINED = (40, 80, 130)  # cells per coin that each stage divides by four and computes anew
_LEVELS = (3, 2, 1, 0)  # of the pyramid: a pixel is about as large as a cell
_CHANNELS = 32
_FEATURES = 4  # of the photograph: grey and its gradient
_SMALLEST_COIN = 200  # pixels
_BATCH = 4
_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Coins:
    """The coins of a photograph, their boxes and masks.

    Attributes:
        photo: [3, H, W].
        pyramid: grey and its gradient at STRIDES, [1, 4, H_l, W_l] each.
        corners: (x1, y1, x2, y2) of each coin in pixels, [R, 4].
        boxes: around the coin, but neither tight nor centred, as a detector's, [R, 4].
        masks: the coin of each box, 0 or 1, [R, 1, H, W].
    """

    photo: Tensor
    pyramid: list[Tensor]
    corners: Tensor
    boxes: Tensor
    masks: Tensor

    def part(self, chosen: slice | Tensor) -> Coins:
        return replace(self, corners=self.corners[chosen], boxes=self.boxes[chosen], masks=self.masks[chosen])

    def in_other_boxes(self, generator: torch.Generator) -> Coins:
        return replace(self, boxes=_around(self.corners, generator))

    def targets(self, side: int) -> Tensor:
        """Which cells of side x side per box are the coin's, [R, 1, side, side] bool."""
        index = torch.arange(len(self.boxes), device=self.boxes.device)
        rois = torch.cat([index[:, None].float(), self.boxes], 1)
        shares: Tensor = roi_align([self.masks], rois, torch.zeros_like(index), side, strides=(1,))
        return shares > 0.5


def find_coins(device: str) -> Coins:
    """Coins by watershed from the very dark and the very light pixels, as in scikit-image's gallery."""
    from skimage.filters import sobel
    from skimage.measure import label, regionprops
    from skimage.segmentation import watershed

    photo = load(PHOTO, 384)
    height, width = (side // STRIDES[-1] * STRIDES[-1] for side in photo.shape[1:])
    photo = photo[:, :height, :width].contiguous()
    grey = photo[0].numpy()
    markers = 1 * (grey < 30 / 255) + 2 * (grey > 150 / 255)
    regions = regionprops(label(watershed(sobel(grey), markers) == 2))
    coins = [region for region in regions if region.area > _SMALLEST_COIN]
    masks = torch.zeros(len(coins), 1, height, width)
    for mask, coin in zip(masks, coins, strict=True):
        y1, x1, y2, x2 = coin.bbox
        mask[0, y1:y2, x1:x2] = torch.from_numpy(coin.image_filled)

    corners = torch.tensor([coin.bbox for coin in coins]).float()[:, [1, 0, 3, 2]].to(device)
    pyramid = [_features(F.avg_pool2d(photo[None, :1], stride)).to(device) for stride in STRIDES]
    boxes = _around(corners, torch.Generator().manual_seed(0))
    return Coins(photo, pyramid, corners, boxes, masks.to(device))


def _around(corners: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes as a detector's: around the coin, but neither tight nor centred."""
    size, centre = corners[:, 2:] - corners[:, :2], (corners[:, 2:] + corners[:, :2]) / 2
    shift, margin = torch.rand(2, len(corners), 2, generator=generator).to(corners)
    centre, half = centre + 0.2 * size * (shift - 0.5), size * (0.65 + 0.15 * margin)
    return torch.cat([centre - half, centre + half], 1)


def _features(grey: Tensor) -> Tensor:
    """Grey, its gradient in x and y, and the length of it, [1, 4, H, W], each of mean 0 and deviation 1."""
    down, across = torch.gradient(grey, dim=(2, 3))
    features = torch.cat([grey, across, down, (across**2 + down**2).sqrt()], 1)
    return (features - features.mean((2, 3), keepdim=True)) / features.std((2, 3), keepdim=True)


# ------------------------------------------------------------------------------------------ head


@dataclass(frozen=True)
class Stage:
    """What one stage of the head has made.

    Attributes:
        before, after: the features that the fusion module reads, and those that it makes.
        logits: of the masks, [R, 1, side, side]; only those of active cells are new.
    """

    before: SPS
    after: SPS
    logits: Tensor

    @property
    def share(self) -> float:
        """The part of all cells that is active."""
        return len(self.after.active) / self.after.index_map.numel()

    @property
    def active(self) -> Tensor:
        """Which cells are active, [R, side, side]."""
        return self.after.index_map < len(self.after.active)


class Head(nn.Module):
    """EffSeg's mask head in small: a coarse mask of all cells, then three stages at its boundary alone.

    A stage keeps the cells active whose logit is nearest to 0, divides them by four, reads the photograph
    at the centres of the new cells and corrects their logits by a fusion module, which looks at all
    cells around. The stages share their weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Sequential(
            nn.Conv2d(_FEATURES + 3, _CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1),
            nn.ReLU(),
        )
        self.coarse_logit = nn.Linear(_CHANNELS, 1)
        self.photo = nn.Linear(_CHANNELS + _FEATURES + 1, _CHANNELS)
        self.fusion = SPSFusion(_CHANNELS)
        self.correction = nn.Linear(_CHANNELS, 1)

    def forward(self, pyramid: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, list[Stage]]:
        """The logits of the coarse masks, [R, 1, 8, 8], and the stages."""
        x, coarse = self.start(pyramid, boxes)
        everywhere = torch.ones_like(x[:, 0], dtype=torch.bool)
        sps, logits, stages = sps_from_dense(x, everywhere), coarse, []
        for level, refined in zip(_LEVELS[1:], REFINED, strict=True):
            uncertainty = -logits[cells_of(sps)].detach().abs()
            sps = sps_refine(sps, uncertainty, refined * len(boxes))
            logits = _double(logits)
            known = logits[cells_of(sps)]
            side = sps.index_map.shape[1]
            read = _read_photo(pyramid, level, boxes[sps.roi.long()], (sps.xy + 0.5) / side)
            new = F.relu(self.photo(torch.cat([sps.active, read, known[:, None]], 1)))
            before = replace(sps, active=sps.active + new)
            sps = self.fusion(before)
            logits = logits.index_put(cells_of(sps), known + self.correction(sps.active)[:, 0])
            stages.append(Stage(before, sps, logits))
        return coarse, stages

    def start(self, pyramid: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Features [R, F, 8, 8] and logits [R, 1, 8, 8] of the coarse masks."""
        count, side = len(boxes), SIDES[0]
        rois = torch.cat([boxes.new_zeros(count, 1), boxes], 1)
        level = torch.full((count,), _LEVELS[0], device=boxes.device)
        crops = roi_align(pyramid, rois.to(pyramid[0]), level, side, strides=STRIDES)
        steps = (2 * torch.arange(side, device=boxes.device) + 1) / side - 1
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        place = torch.stack([x, y, x**2 + y**2]).to(crops).expand(count, -1, -1, -1)
        features = self.coarse(torch.cat([crops, place], 1))
        return features, _everywhere(self.coarse_logit, features)

    def dense(self, pyramid: Sequence[Tensor], boxes: Tensor, active: Sequence[Tensor]) -> list[Tensor]:
        """The logits of each stage by torch.nn.functional.conv2d on all cells.

        All cells are computed, and the results of those in active, [R, side, side] per stage, are kept.
        """
        x, logits = self.start(pyramid, boxes)
        outputs = []
        for level, mask in zip(_LEVELS[1:], active, strict=True):
            x, logits, chosen = F.interpolate(x, scale_factor=2), _double(logits), mask[:, None]
            count, side = len(boxes), x.shape[2]
            centres = (torch.arange(side, device=boxes.device) + 0.5) / side
            places = torch.cartesian_prod(centres, centres).flip(1).repeat(count, 1)
            read = _read_photo(pyramid, level, boxes.repeat_interleave(side * side, 0), places)
            read = read.view(count, side, side, -1).permute(0, 3, 1, 2)
            new = F.relu(_everywhere(self.photo, torch.cat([x, read, logits], 1)))
            x = torch.where(chosen, x + new, x)
            x = torch.where(chosen, F.relu(_everywhere(self.fusion.input_proj, x)), x)
            fused = plain_dense(x, *self.branches())
            x = torch.where(chosen, _everywhere(self.fusion.output_proj, fused), x)
            logits = torch.where(chosen, logits + _everywhere(self.correction, x), logits)
            outputs.append(logits)
        return outputs

    def branches(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Weights, biases and dilations of the fusion module's convolutions."""
        convs: list[Any] = list(self.fusion.convs)
        return [conv.weight for conv in convs], [conv.bias for conv in convs], list(self.fusion.dilations)


def plain_dense(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dilations: Sequence[int]
) -> Tensor:
    """sps_conv2d with ReLU in plain PyTorch on dense maps [R, F, H, W]: at all cells, active or not."""
    return torch.stack(
        [
            F.relu(F.conv2d(x, weight, bias, padding=dilation * (weight.shape[2] // 2), dilation=dilation))
            for weight, bias, dilation in zip(weights, biases, dilations, strict=True)
        ]
    ).sum(0)


def cells_of(sps: SPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the active cells are in maps [R, 1, H, W]."""
    x, y = sps.xy.long().unbind(1)
    return sps.roi.long(), torch.zeros_like(x), y, x


def _everywhere(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer for rows, applied to every cell of [R, F, H, W]."""
    output: Tensor = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return output


def _double(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


def _read_photo(pyramid: Sequence[Tensor], level: int, boxes: Tensor, places: Tensor) -> Tensor:
    """Features [N, 4] of the photograph at places [N, 2] inside of boxes [N, 4], which go from 0 to 1."""
    height, width = pyramid[0].shape[2:]
    xy = (boxes[:, :2] + places * (boxes[:, 2:] - boxes[:, :2])) / boxes.new_tensor([width, height])
    batch = torch.zeros(len(xy), dtype=torch.int64, device=xy.device)
    read: Tensor = point_sample(pyramid, batch, torch.full_like(batch, level), xy.to(pyramid[0]))
    return read


def learn(coins: Coins, steps: int) -> Head:
    """A head that has seen coins for a number of steps of gradient descent."""
    device = coins.boxes.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head().to(device)
    optimizer = torch.optim.Adam(head.parameters(), _LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randperm(len(coins.boxes), generator=generator)[:_BATCH].to(device)
        some = coins.part(chosen).in_other_boxes(generator)
        targets = [some.targets(side).float() for side in SIDES]
        coarse, stages = head(some.pyramid, some.boxes)
        loss = F.binary_cross_entropy_with_logits(coarse, targets[0])
        for stage, target in zip(stages, targets[1:], strict=True):
            cells = cells_of(stage.after)
            loss += F.binary_cross_entropy_with_logits(stage.logits[cells], target[cells])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - step / steps)
        optimizer.step()
    return head


def overlap(logits: Tensor, targets: Tensor, mode: str = "bilinear") -> Tensor:
    """Intersection over union of each mask [R, 1, H, W], made as large as its target, [R]."""
    sized = F.interpolate(logits, size=targets.shape[2:], mode=mode)
    masks = sized > 0
    both, either = ((masks & targets).sum((1, 2, 3)), (masks | targets).sum((1, 2, 3)))
    return both / either
