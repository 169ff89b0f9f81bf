"""Claims: which run works on an attempt, so that the next run may go on with what a dead one left.

<product>/claims/<attempt>.json   owner of the attempt; not part of what is published
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stsr_core.catalog.documents import ConflictError
from stsr_core.errors import PublicationError

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Document
    from stsr_core.catalog.publish import Attempt

FOLDER = "claims"


def claim(attempt: Attempt, owner: str, is_over: Callable[[str], bool]) -> bool:
    """Make an attempt one's own: a new one, one's own of before, or that of a run that is over.

    Of several that claim one attempt, one wins: the claim is created or replaced by a conditional write.

    Args:
        attempt: what to claim.
        owner: name of the run that claims it; it may be claimed again under the same name.
        is_over: whether the run of that name has ended and will never write again.

    Returns:
        Whether it is now the owner's; if not, another run is at work on it.

    Raises:
        PublicationError: the destination cannot be written.
    """
    documents, path = attempt.documents, _path(attempt)
    mine: Document = {"owner": owner, "at": datetime.now(UTC).isoformat()}
    try:
        documents.create(path, mine)
    except ConflictError:
        found = documents.read(path)
        if found is None or not (found[0]["owner"] == owner or is_over(str(found[0]["owner"]))):
            return False
        try:
            documents.replace(path, mine, found[1])
        except ConflictError:
            return False
    return True


def require_claim(attempt: Attempt, owner: str) -> None:
    """Refuse to go on with an attempt that another run has taken over.

    Raises:
        PublicationError: it has.
    """
    found = attempt.documents.read(_path(attempt))
    if found is not None and found[0]["owner"] != owner:
        raise PublicationError(
            f"Run {found[0]['owner']} has taken over {attempt.url}, because this run was thought dead. It finishes "
            "the work; there is nothing to do here."
        )


def release(attempt: Attempt) -> None:
    """Forget the claim on an attempt that is published."""
    attempt.documents.remove(_path(attempt))


def _path(attempt: Attempt) -> str:
    return f"{attempt.product}/{FOLDER}/{attempt.name}.json"
