"""A training that takes seconds: tiny networks, a few steps, and patches of a fifth of the size."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stsr_core.checkpoint import Architecture
from stsr_core.training import patches
from stsr_core.training.presets import Preset

TINY = Preset(
    Architecture(mean_channels=(8, 32), denoiser_channels=(8, 32)), 6, 4, 2, 2, 1, save_every=2, calibration_patches=1
)


@contextmanager
def small_patches() -> Iterator[None]:
    """Let patches have 48 fine cells along an edge instead of 112."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "CELL_TARGET", 48)
        yield
