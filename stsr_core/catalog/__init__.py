"""The STAC catalogue of published versions. Importing it needs neither torch nor prefect, and is cheap."""

from stsr_core.catalog.index import Query
from stsr_core.catalog.search import Version, find, latest, ls, newest, open_version, search, withdrawn
from stsr_core.catalog.search import open_version as open  # noqa: A004  the word users expect

__all__ = ["Query", "Version", "find", "latest", "ls", "newest", "open", "open_version", "search", "withdrawn"]
