"""stsr: operational spatiotemporal super-resolution of climate-model precipitation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stsr_core.ensemble.downscale import downscale

__all__ = ["downscale"]


def __getattr__(name: str) -> object:
    """Import `downscale`, and torch with it, only when it is asked for."""
    if name == "downscale":
        from stsr_core.ensemble.downscale import downscale

        return downscale
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
