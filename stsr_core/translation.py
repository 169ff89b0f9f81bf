"""Whether kernels for GPUs can be translated where this runs."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

COMPILERS = ("gcc", "clang")  # that Triton looks for


def missing() -> str:
    """What kernels of our own lack here; they are the faster way on GPUs, torch's calls the other. Empty: nothing."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not os.environ.get("CC") and not any(map(shutil.which, COMPILERS)):
        return "no C compiler is there"
    return ""


CAN_TRANSLATE = not missing()
