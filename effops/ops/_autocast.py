"""Autocast rules, per argument.

``torch.library.register_autocast`` casts every floating input to one dtype that is fixed when it is
registered; the ops need the dtype of the moment, and coordinates that stay float32.
"""

from typing import Any

import torch
from torch import Tensor

from effops.ops._autograd import library

KEEP, CAST, FLOAT32 = "keep", "cast", "float32"


def install(name: str, rules: tuple[str, ...]) -> None:
    """Registers ``effops::<name>`` for autocast with a rule per positional argument.

    ``CAST``: to the autocast dtype; ``FLOAT32``: half precision to float32; ``KEEP``: as it is. float64
    tensors are never cast. The rule of a list holds for its tensors.
    """
    op = getattr(torch.ops.effops, name).default
    half = (torch.float16, torch.bfloat16)

    def cast(value: Any, rule: str, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(item, rule, dtype) for item in value]
        if not isinstance(value, Tensor):
            return value
        if rule == CAST and value.dtype in (torch.float32, *half):
            return value.to(dtype)
        if rule == FLOAT32 and value.dtype in half:
            return value.float()
        return value

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*inputs: Any, device: str = device, keys: Any = keys) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*(cast(value, rule, dtype) for value, rule in zip(inputs, rules, strict=True)))

        library.impl(name, kernel, key)
