"""Other implementations of Hamming search and of what prepares binary descriptors.

`knn` peers take sets of bytes [N, bytes] (uint8 tensors) and k, and return something whose distances
`distances_of` turns into a tensor [N, k]; `match` peers return pairs (index in a, index in b). Only what has
to happen per call is in the call: conversions to NumPy share memory, and indices of faiss are built before.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from peers import MISSING
from torch import Tensor

Call = Callable[[], Any]

_MOST_ROWS_OF_CV2 = 1 << 18


def _load(name: str) -> Any:
    """The module, with one thread per thread of torch; None, and a line in MISSING, if it does not load."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken binary may raise anything at import
        MISSING[name] = f"{type(error).__name__}: {error}".split("\n")[0]
        return None
    set_threads = module.setNumThreads if name == "cv2" else module.omp_set_num_threads
    set_threads(torch.get_num_threads())
    return module


def plain_distance(a: Tensor, b: Tensor) -> Tensor:
    """[Na, Nb] by the matrix product of +-1 descriptors, which is exact in half precision too."""
    dtype = torch.float32 if a.device.type == "cpu" else torch.float16
    return (8 * a.shape[1] - _signs(a, dtype) @ _signs(b, dtype).T) / 2


def plain_knn(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of all distances."""
    distances, indices = plain_distance(a, b).topk(min(k, len(b)), dim=1, largest=False)
    return distances, indices


def _signs(words: Tensor, dtype: torch.dtype) -> Tensor:
    bits = words[:, :, None] >> torch.arange(8, device=words.device, dtype=torch.uint8) & 1
    return (2.0 * bits - 1).flatten(1).to(dtype)


def knn(a: Tensor, b: Tensor, k: int) -> dict[str, Call]:
    """Calls that find the k nearest rows of b, by name of the peer."""
    calls: dict[str, Call] = {"matmul + topk": lambda: plain_knn(a, b, k)}
    if a.device.type != "cpu":
        return calls
    first, second = a.numpy(), b.numpy()
    if faiss := _load("faiss"):
        index = faiss.IndexBinaryFlat(8 * a.shape[1])
        index.add(second)
        index.query_batch_size = len(a)  # its quickest setting
        calls["faiss knn_hamming"] = lambda: faiss.knn_hamming(first, second, k)
        calls["faiss IndexBinaryFlat"] = lambda: index.search(first, k)
    if len(b) < _MOST_ROWS_OF_CV2 and (cv2 := _load("cv2")):
        matcher = cv2.BFMatcher(cv2.NORM_HAMMING)
        calls["cv2.BFMatcher"] = lambda: matcher.knnMatch(first, second, k)
    return calls


def distances_of(result: Any) -> Tensor:
    """[N, k] int64, from what a peer of `knn` returned."""
    if isinstance(result[0], (tuple, list)):  # cv2: lists of DMatch
        return torch.tensor([[match.distance for match in row] for row in result]).long()
    return torch.as_tensor(result[0]).long().cpu()


def match(a: Tensor, b: Tensor) -> dict[str, Call]:
    """Calls that find mutual nearest neighbours."""
    calls: dict[str, Call] = {"matmul": lambda: _plain_match(a, b)}
    if a.device.type == "cpu" and (cv2 := _load("cv2")):
        matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)
        first, second = a.numpy(), b.numpy()
        calls["cv2.BFMatcher"] = lambda: matcher.match(first, second)
    return calls


def _plain_match(a: Tensor, b: Tensor) -> Tensor:
    distances = plain_distance(a, b)
    of_a, of_b = distances.argmin(1), distances.argmin(0)
    rows = torch.arange(len(a), device=a.device)
    mutual = of_b[of_a] == rows
    return torch.stack([rows[mutual], of_a[mutual]], 1)


def plain_topk_pack(x: Tensor, k: int) -> Tensor:
    """The bits as booleans: plain PyTorch has no packing."""
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(k, sorted=False).indices, True)


class PlainBinNorm(torch.autograd.Function):
    """ZippyPoint's training layer in plain PyTorch: brackets of 60 branches, at most 10 rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        ordered = x.sort(1, descending=True).values
        low = -ordered[:, k - 1] - 7
        high = -ordered[:, k] + 7
        branches = torch.linspace(0, 1, 60, device=x.device)
        for _ in range(10):
            nu = low[:, None] + (high - low)[:, None] * branches
            sums = torch.sigmoid(x[:, None] + nu[:, :, None]).sum(2) - k
            above = (sums >= 0).int().argmax(1).clamp(min=1)[:, None]
            low, high = nu.gather(1, above - 1)[:, 0], nu.gather(1, above)[:, 0]
            if bool(((high - low) < 1e-4).all()):
                break
        y = torch.sigmoid(x + ((low + high) / 2)[:, None])
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        h = y * (1 - y)
        return h * (grad - (h * grad).sum(1, keepdim=True) / h.sum(1, keepdim=True)), None


class PlainBisection(PlainBinNorm):
    """The same by bisection, 26 sigmoids of x: as quick as plain PyTorch gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        centre = math.log(k / (x.shape[1] - k))
        low, high = centre - x.amax(1, keepdim=True), centre - x.amin(1, keepdim=True)
        for _ in range(25):
            nu = (low + high) / 2
            above = torch.sigmoid(x + nu).sum(1, keepdim=True) > k
            low, high = torch.where(above, low, nu), torch.where(above, nu, high)
        y = torch.sigmoid(x + (low + high) / 2)
        ctx.save_for_backward(y)
        return y
