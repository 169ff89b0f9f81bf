"""The STAC catalogue of published versions. Importing it needs neither torch nor prefect, and is cheap."""

from stsr_core.catalog.search import latest, ls, open_version
from stsr_core.catalog.search import open_version as open  # noqa: A004  the word users expect

__all__ = ["latest", "ls", "open", "open_version"]
