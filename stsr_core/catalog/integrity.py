"""Check a published version, or a downloaded copy of one, against its own manifest and its own coarse totals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from stsr_core.catalog.addresses import SHA256, checksum
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.manifest import NAME, Manifest, compare, is_item
from stsr_core.errors import StoreError
from stsr_core.store.coarse import ARRAY, factor_between, read_coarse, totals_of_members
from stsr_core.store.group import open_array
from stsr_core.store.layout import blocks, coarse_region
from stsr_core.store.verify import closure_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import zarr
    from numpy.typing import NDArray

    from stsr_core.catalog.documents import Document, Options
    from stsr_core.factors import Factor


class Verdict(BaseModel):
    """What was found of a version.

    Attributes:
        item: id of its item.
        digest: sha256 of its manifest, which identifies every byte of it.
        objects: objects that were read.
        flaws: what is wrong, one sentence each; empty where nothing is.
        closure_quanta: largest closure of a coarse cell over all members, in quanta of 0.01 mm.
    """

    model_config = ConfigDict(frozen=True)

    item: str
    digest: str
    objects: int
    flaws: tuple[str, ...]
    closure_quanta: int

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.flaws


def verify_version(url: str, options: Options | None = None, *, item_name: str | None = None) -> Verdict:
    """Re-compute digests and closure of the version at a folder or URL.

    Args:
        url: folder of the version, that of its item; published or a copy.
        options: options of the filesystem.
        item_name: name of the item in it; without it the folder is listed, which plain http cannot do.

    Raises:
        StoreError: there is no version at `url`, or its manifest is damaged.
    """
    documents = Documents.at(url, options)
    item = _item(documents, item_name)
    found = documents.fetch(NAME)
    if found is None:
        raise StoreError(f"{url} has no {NAME}. Copy the whole version, or fetch it again.")
    digest = checksum(found[0])
    manifest = Manifest.decode(found[0], f"{url}/{NAME}")
    flaws = [] if item["assets"]["manifest"].get("file:checksum") == digest else [
        f"{NAME} is not the one that the item names"
    ]  # fmt: skip
    damaged = compare(documents, "", manifest)
    flaws += damaged
    worst = 0
    if not damaged:
        worst, more = _closure(url, options, bool(item["properties"].get("stsr:conserved", True)))
        flaws += more
    return Verdict(
        item=str(item["id"]), digest=digest.removeprefix(SHA256), objects=len(manifest.objects), flaws=tuple(flaws),
        closure_quanta=worst,
    )  # fmt: skip


def _item(documents: Documents, name: str | None) -> Document:
    if name is None and documents.destination.startswith(("http://", "https://")):
        raise StoreError(
            f"{documents.destination} cannot be searched for an item, as plain http lists no files. Name the version "
            "by its catalogue: stsr catalog verify PRODUCT --catalog URL --version VERSION."
        )
    names = [name] if name else sorted((n for n in documents.names("") if is_item(n)), key=lambda n: (len(n), n))
    found = documents.read(names[-1]) if names else None
    if found is None:
        raise StoreError(f"{documents.destination} holds no item v1.json, v2.json ... Name the folder of one version.")
    return found[0]


def _closure(url: str, options: Mapping[str, object] | None, conserved: bool) -> tuple[int, list[str]]:
    """Largest closure [quanta] over all members and coarse cells, and what is wrong with it."""
    ensemble, totals_url = f"{url}/data.zarr/ensemble", f"{url}/data.zarr/coarse"
    coarse = read_coarse(totals_url, options)
    array = open_array(ensemble, ARRAY, options, mode="r")
    factor = factor_between(array.shape, coarse.shape)
    driving = totals_of_members(ensemble, totals_url, array.shape[0], options)
    worst, flaws = 0, []
    for quanta, totals, where in _of_driving_members(array, coarse, factor, driving):
        closure, wrong = closure_of(quanta, totals, factor)
        worst = max(worst, closure)
        if wrong:
            flaws.append(f"missing cells unlike those of the input at {where}")
    if conserved and worst > 0:
        flaws.append(f"a coarse total differs by {worst} quanta")
    return worst, flaws


def _of_driving_members(
    array: zarr.Array[Any], coarse: NDArray[np.float32], factor: Factor, driving: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.float32], str]]:
    """Members of the shards of an ensemble with the coarse totals that belong to them."""
    shard = array.shards or array.chunks
    for region in blocks(array.shape, shard):
        of, inside = driving[region[0]], coarse_region(region, factor)
        quanta, where = np.asarray(array[region]), "-".join(str(part.start) for part in region)
        yield from ((quanta[of == r], coarse[r][inside], where) for r in np.unique(of))


def citation(item: Mapping[str, Any], url: str) -> tuple[str, str]:
    """Citation of a version as a sentence and as BibTeX."""
    p, digest = item["properties"], manifest_digest(item)
    year, version = p["created"][:4], p["version"]
    title = p["title"].removesuffix(f", {version}")
    maker = p["providers"][0]["name"]
    withdrawn = (
        " WITHDRAWN: " + p["stsr:withdrawn"].translate({ord(c): None for c in "{}"}) if p.get("deprecated") else ""
    )
    note = f"version {version}, manifest sha256 {digest}"
    text = (
        f"{title}, {note}, published {p['created'][:10]}, made by stsr {p['processing:software']['stsr']} with "
        f"checkpoint {p['stsr:checkpoint']} ({p['stsr:checkpoint_digest'][:12]}) from data of {maker}. {url}{withdrawn}"
    )
    fields = {
        "title": f"{{{title}}}", "author": f"{{{maker}}}", "year": year, "version": version, "url": url,
        "note": f"Downscaled by stsr {p['processing:software']['stsr']}; manifest sha256 {digest}.{withdrawn}",
    }  # fmt: skip
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return text, f"@dataset{{{item['id']},\n{body}\n}}"


def manifest_digest(item: Mapping[str, Any]) -> str:
    """Digest of a version's manifest as its item states it."""
    return str(item["assets"]["manifest"]["file:checksum"]).removeprefix(SHA256)
