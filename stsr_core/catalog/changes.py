"""Whether a product would still be made as its last version was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stsr_core.catalog.items import Entries

if TYPE_CHECKING:
    from stsr_core.checkpoint import Library


def changes(
    properties: Mapping[str, Any], entries: Entries, statics: Mapping[str, str], library: Library, limit: float
) -> list[str]:
    """What determines a version's bytes, besides the content of its source, and is not as its item says.

    The code is not compared: a redeployment alone publishes nothing.

    Args:
        properties: of the item.
        entries: what catalog.yaml says now.
        statics: fingerprints of the static fields now, by name.
        library: the checkpoints that are served now.
        limit: largest ratio on an axis between the factor asked for and the one used.

    Returns:
        Names such as `product.members` or `checkpoint`; empty where nothing has changed.

    Raises:
        FactorError: no checkpoint serves the product any more.
    """
    try:
        before = Entries.model_validate_json(json.dumps(properties["stsr:configuration"])).making
    except (KeyError, ValidationError):  # made by other code, so it does not say
        return ["configuration"]
    now = entries.making
    found = [f"{part}.{name}" for part in now for name in now[part] if now[part][name] != before[part].get(name)]
    found += [f"static {name}" for name, was in properties["stsr:statics"].items() if statics.get(name) != was]
    space, time = properties["stsr:requested_factor"]
    match = library.family.nearest(space, time, limit=limit)
    if library.serving(match.factor).digest != properties["stsr:checkpoint_digest"]:
        found.append("checkpoint")
    elif [match.factor.space, match.factor.time] != list(properties["stsr:factor"]):
        found.append("factor")
    return found
