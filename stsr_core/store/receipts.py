"""Receipts: what proves that a shard is written. They lie below the array they vouch for."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from stsr_core.errors import StoreError
from stsr_core.store.group import filesystem, put, read_object

if TYPE_CHECKING:
    from stsr_core.store.group import Options


class Receipt(BaseModel):
    """Proof of one shard.

    Attributes:
        shard: its key.
        plan_digest: over everything that determines its bytes.
        bytes_digest: sha256 of the stored object.
        closure_quanta: largest absolute closure of a coarse cell, in storage quanta.
        network_evaluations: evaluations on windows that it took.
        made_on: kind of device, and precision of the networks; receipts of early versions do not say.
        wet: cells above 0.1 mm, over all members.
        missing: missing cells, over all members.
        sum_mm: sum over all cells [mm].
        max_mm: largest amount [mm].
        rain_mm: mean amount over cells that are wet in any member [mm].
        spread_mm: mean standard deviation over members in the same cells [mm].
        sums: what statistics of the ensemble are made of, see `store.statistics`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str
    plan_digest: str
    bytes_digest: str
    closure_quanta: int
    network_evaluations: int
    made_on: str = ""
    wet: int
    missing: int
    sum_mm: float
    max_mm: float
    rain_mm: float
    spread_mm: float
    sums: dict[str, float]


def _folder(array: str) -> str:
    return f"{array}/receipts"


def write_receipt(url: str, array: str, receipt: Receipt, options: Options | None = None) -> None:
    """Write a receipt; its shard must be stored before."""
    fs, path = filesystem(url, options)
    content = (receipt.model_dump_json(indent=1) + "\n").encode()
    put(fs, f"{path}/{_folder(array)}/{receipt.shard}.json", content)


def read_receipt(url: str, array: str, shard: str, options: Options | None = None) -> Receipt | None:
    """Read the receipt of one shard; None where there is none that can be read."""
    try:
        return Receipt.model_validate_json(read_object(f"{url}/{_folder(array)}/{shard}.json", options))
    except (StoreError, ValidationError):
        return None


def read_receipts(url: str, array: str, options: Options | None = None) -> dict[str, Receipt]:
    """Read all receipts of an array, by shard key; none where nothing is written yet.

    One that cannot be read counts as absent: its writer was killed, so its shard is made again.
    """
    fs, path = filesystem(url, options)
    fs.invalidate_cache()  # workers write receipts after this process has listed the folder
    try:  # neither glob nor cat, to which [, * and ? in the path of a store are patterns
        names = sorted(name for name in fs.ls(f"{path}/{_folder(array)}", detail=False) if name.endswith(".json"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for raw in fs.cat_ranges(names, None, None, on_error="raise"):
        with suppress(ValidationError):
            receipt = Receipt.model_validate_json(raw)
            found[receipt.shard] = receipt
    return found
