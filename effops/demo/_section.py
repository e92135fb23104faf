"""What a section of the demo takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Settings:
    """How to run the demo.

    Attributes:
        output: folder of the page and its pictures.
        sections: names of the sections to run, see `effops.demo.sections`.
        device: "cpu" or "cuda".
        photo_side: photographs are reduced to at most this many pixels on the longer side.
        seconds: time for each comparison of times.
        learning_steps: steps of gradient descent where a section learns something.
    """

    output: Path
    sections: tuple[str, ...]
    device: str = "cpu"
    photo_side: int = 640
    seconds: float = 3.0
    learning_steps: int = 300

    @classmethod
    def make(
        cls, output: Path, sections: Sequence[str], *, device: str = "auto", quick: bool = False
    ) -> Settings:
        """Settings as the command line gives them.

        Raises:
            ValueError: an unknown section or device, or no CUDA device.
        """
        from effops import _load
        from effops.demo.sections import SECTIONS

        names = tuple(name.strip() for name in sections if name.strip())
        unknown = [name for name in names if name not in SECTIONS]
        if unknown or not names:
            raise ValueError(
                f"expected sections among {', '.join(SECTIONS)}, got {', '.join(unknown) or None}"
            )
        has_cuda = torch.cuda.is_available() and _load.cuda_missing_reason is None
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"expected device auto, cpu or cuda, got {device}")
        if device == "cuda" and not has_cuda:
            raise ValueError(
                f"no CUDA device for effops: {_load.cuda_missing_reason or 'torch finds no GPU'}"
            )
        if device == "auto":
            device = "cuda" if has_cuda else "cpu"
        if quick:
            return cls(output, names, device, photo_side=160, seconds=0.2, learning_steps=20)
        return cls(output, names, device)


@dataclass(frozen=True)
class Figure:
    """A picture in the output folder and what to see in it."""

    file: str
    title: str
    caption: str


@dataclass(frozen=True)
class Row:
    """One comparison with plain PyTorch.

    `error` is the largest difference from `effops.reference` in float64, divided by the reference's
    largest absolute value.
    """

    op: str
    case: str
    shape: str
    seconds: float
    plain_seconds: float
    error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """How many times the op's time plain PyTorch takes."""
        return self.plain_seconds / self.seconds

    @property
    def is_correct(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Result:
    """What a section found out."""

    text: str
    figures: Sequence[Figure]
    rows: Sequence[Row]


Step = Callable[[str], None]


@dataclass(frozen=True)
class Section:
    """An op's part of the demo: `run` calls its second argument `steps` times, before each piece of work."""

    title: str
    steps: int
    run: Callable[[Settings, Step], Result]
