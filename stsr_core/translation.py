"""Whether kernels for GPUs can be translated where this runs, and for which."""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COMPILERS = ("gcc", "clang")  # that Triton looks for
CAPABILITY = (8, 0)  # of GPUs that multiply in bfloat16, as the kernels do


def missing() -> str:
    """What kernels of our own lack here; they are the faster way on GPUs, torch's calls the other. Empty: nothing."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not os.environ.get("CC") and not any(map(shutil.which, COMPILERS)):
        return "no C compiler is there"
    return ""


CAN_TRANSLATE = not missing()


@lru_cache
def kernels_serve(device: torch.device) -> bool:
    """Whether kernels of our own work on a device: GPUs of compute capability 8.0 or more, where they can be made."""
    from torch import cuda

    return device.type == "cuda" and CAN_TRANSLATE and cuda.get_device_capability(device) >= CAPABILITY
