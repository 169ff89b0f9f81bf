"""Gates: what must hold of a finished ensemble before anyone sees it. Recomputed from the stored bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict

from stsr_core.errors import GateError, StoreError
from stsr_core.store.group import open_array, read_object
from stsr_core.store.layout import MISSING, QUANTUM_MM, Region, coarse_region, shard_path
from stsr_core.store.statistics import STATISTICS, WET_MM, added, statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.configuration import Gates, LikeCard
    from stsr_core.factors import Factor
    from stsr_core.store.group import Options
    from stsr_core.store.receipts import Receipt

SAMPLE = 64  # shards whose cells are added up anew
READERS = 8  # objects read at a time
JUDGED = 50  # wet coarse cells and steps below which statistics are those of single showers


@dataclass(frozen=True)
class Expected:
    """A planned shard: its key, the region it fills, the digest its receipt must carry, and its driving member."""

    key: str
    region: Region
    plan_digest: str
    driving: int = 0


Valid: TypeAlias = "tuple[Expected, Receipt]"
"""A planned shard with the receipt of its plan."""


@dataclass(frozen=True)
class StoredShard:
    """A shard that a receipt vouches for: its key, the region it fills, and the sha256 of its bytes."""

    key: str
    region: Region
    bytes_digest: str


def damaged(url: str, array: str, shards: Sequence[StoredShard], options: Options | None = None) -> list[str]:
    """Keys of shards whose stored bytes are not those of their receipts: changed, truncated or missing."""
    if not shards:
        return []
    try:
        opened = open_array(url, array, options, mode="r")
    except FileNotFoundError:
        return [shard.key for shard in shards]
    shape = opened.shards or opened.chunks

    def digest(shard: StoredShard) -> str:
        try:
            return hashlib.sha256(read_object(shard_path(url, array, shape, shard.region), options)).hexdigest()
        except StoreError:
            return "missing"

    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(digest, shards)
        return [shard.key for shard, found in zip(shards, digests, strict=True) if found != shard.bytes_digest]


class Gate(BaseModel):
    """One gate: what was found, what is needed, where it fails."""

    model_config = ConfigDict(frozen=True)

    name: str
    passed: bool
    found: str
    needed: str
    where: str = ""


class GateReport(BaseModel):
    """All gates of one ensemble."""

    model_config = ConfigDict(frozen=True)

    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate is passed."""
        return all(gate.passed for gate in self.gates)

    def raise_if_failed(self) -> None:
        """Raise GateError that names every gate that failed."""
        failed = [
            f"{g.name}: found {g.found}, needed {g.needed}{f' ({g.where})' if g.where else ''}"
            for g in self.gates
            if not g.passed
        ]
        if failed:
            raise GateError("Nothing was published. " + "; ".join(failed) + ". The attempt is kept for inspection.")


@dataclass(frozen=True)
class Stored:
    """An ensemble array and what it was made from.

    Attributes:
        url: its store.
        array: its name.
        factor: (s, t).
        coarse: amount [mm per coarse step] of every driving member, (T, Y, X), NaN where missing.
        members: number of members of each driving member.
        conserved: whether closure was enforced.
        options: options of the filesystem.
        scores: what the checkpoint's card says of its validation, by name.
        statistics: what it says of the ensembles made for that, see `store.statistics`.
    """

    url: str
    array: str
    factor: Factor
    coarse: Sequence[NDArray[np.float32]]
    members: int
    conserved: bool
    options: Options | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)


def verify(stored: Stored, expected: Sequence[Expected], receipts: Mapping[str, Receipt], gates: Gates) -> GateReport:
    """Check an ensemble against its plan, its receipts and its product's gates."""
    found = ((e, receipts.get(e.key)) for e in expected)
    valid = [(e, receipt) for e, receipt in found if receipt is not None and receipt.plan_digest == e.plan_digest]
    lacking = sorted({e.key for e in expected} - {e.key for e, _ in valid})
    gated = [
        Gate(
            name="receipts",
            passed=not lacking,
            found=f"{len(valid)} valid receipts",
            needed=f"{len(expected)}",
            where=", ".join(lacking[:5]),
        ),
        *_read_back(stored, valid, gates),
        _plausible(valid, gates),
        _spread(stored, valid, gates),
        _wet_fraction(stored, valid, gates),
        _card("spread_skill", "spread over skill", stored, gates.spread_skill),
        _card("wet_fraction_ratio", "wet fraction over truth", stored, gates.wet_fraction_ratio),
        *_like_card(stored, valid, gates),
    ]
    return GateReport(gates=tuple(gated))


def _read_back(stored: Stored, valid: Sequence[Valid], gates: Gates) -> list[Gate]:
    """Gates over closure and missing cells: by the receipts of all shards, of a sample by their cells as well.

    Receipts hold only for the bytes that they were written for, so those of every shard are read.
    """
    shards = [StoredShard(e.key, e.region, receipt.bytes_digest) for e, receipt in valid]
    harmed = damaged(stored.url, stored.array, shards, stored.options)
    masks, worst, worst_key = [], 0, ""
    sound = [e for e, _ in valid[:: max(1, len(valid) // SAMPLE)] if e.key not in harmed]
    for key, closure, wrong in (*_vouched(stored, valid), *_recomputed(stored, sound)):
        if closure > worst:
            worst, worst_key = closure, key
        if wrong and key not in masks:
            masks.append(key)
    bound = gates.max_closure_quanta
    return [
        Gate(
            name="stored bytes", passed=not harmed, found=f"{len(harmed)} damaged of {len(valid)} read back",
            needed="0", where=", ".join(harmed[:5]),
        ),
        Gate(
            name="closure", passed=worst <= bound or not stored.conserved, found=f"{worst} quanta",
            needed=f"{bound} quanta" if stored.conserved else "reported only", where=worst_key,
        ),
        Gate(
            name="missing cells", passed=not masks, found=f"{len(masks)} shards unlike the input", needed="0",
            where=", ".join(masks[:5]),
        ),
    ]  # fmt: skip


def _vouched(stored: Stored, valid: Sequence[Valid]) -> Iterator[tuple[str, int, bool]]:
    """Key, closure and whether missing cells differ from the input's, of each shard as its receipt says."""
    cells = stored.factor.space**2 * stored.factor.time
    for e, receipt in valid:
        members = e.region[0].stop - e.region[0].start
        holes = int(np.isnan(_coarse_part(stored, e)).sum()) * cells * members
        yield e.key, receipt.closure_quanta, receipt.missing != holes


def _recomputed(stored: Stored, shards: Sequence[Expected]) -> Iterator[tuple[str, int, bool]]:
    """The same of each shard, from its stored bytes."""
    if not shards:
        return
    array = open_array(stored.url, stored.array, stored.options, mode="r")
    for e in shards:
        yield e.key, *closure_of(np.asarray(array[e.region]), _coarse_part(stored, e), stored.factor)


def _coarse_part(stored: Stored, e: Expected) -> NDArray[np.float32]:
    return stored.coarse[e.driving][coarse_region(e.region, stored.factor)]


def closure_of(quanta: NDArray[np.uint16], coarse: NDArray[np.float32], factor: Factor) -> tuple[int, bool]:
    """Largest closure [quanta] over the coarse cells, and whether missing cells differ from the input's.

    Args:
        quanta: amount in quanta of 0.01 mm, (M, T*t, Y*s, X*s), uint16.
        coarse: amount [mm per coarse step], (T, Y, X), NaN where missing.
        factor: (s, t).
    """
    s, t = factor.space, factor.time
    m, nt, ny, nx = quanta.shape
    blocks = quanta.reshape(m, nt // t, t, ny // s, s, nx // s, s)
    missing = (blocks == MISSING).mean(axis=(2, 4, 6))
    hole = np.isnan(coarse)
    sums = np.where(blocks == MISSING, 0, blocks).sum(axis=(2, 4, 6), dtype=np.int64)
    wanted = np.rint(s * s * np.nan_to_num(coarse).astype(np.float64) / QUANTUM_MM)
    return int(np.abs(sums - wanted).max(initial=0)), bool((missing != hole).any())


def _plausible(valid: Sequence[Valid], gates: Gates) -> Gate:
    worst = max((receipt for _, receipt in valid), key=lambda r: r.max_mm, default=None)
    found = worst.max_mm if worst else 0.0
    passed = found <= gates.max_mm
    return Gate(
        name="plausible range", passed=passed, found=f"{found:.2f} mm", needed=f"at most {gates.max_mm:g} mm",
        where=worst.shard if worst and not passed else "",
    )  # fmt: skip


def _spread(stored: Stored, valid: Sequence[Valid], gates: Gates) -> Gate:
    several = [receipt for e, receipt in valid if e.region[0].stop - e.region[0].start > 1]  # one alone has no spread
    rain = sum(receipt.rain_mm * receipt.wet for receipt in several)
    spread = sum(receipt.spread_mm * receipt.wet for receipt in several)
    relative = spread / rain if rain else 0.0
    judged = stored.members > 1 and rain > 0
    return Gate(
        name="spread", passed=relative >= gates.min_relative_spread or not judged,
        found=f"{relative:.2f} of the mean" if judged else "one member, or no rain",
        needed=f"at least {gates.min_relative_spread:g}",
    )  # fmt: skip


def _wet_fraction(stored: Stored, valid: Sequence[Valid], gates: Gates) -> Gate:
    """Wet fine cells over the fine cells of coarse cells that are wet on average."""
    wet = sum(receipt.wet for _, receipt in valid)
    s, t = stored.factor.space, stored.factor.time
    under = sum(int((coarse > WET_MM * t).sum()) for coarse in stored.coarse) * s * s * t * stored.members
    share = wet / under if under else 1.0
    return Gate(
        name="wet fraction", passed=share >= gates.min_wet_fraction,
        found=f"{share:.2f} of the cells where it rains" if under else "no rain",
        needed=f"at least {gates.min_wet_fraction:g}",
    )  # fmt: skip


def _card(score: str, name: str, stored: Stored, bounds: tuple[float, float]) -> Gate:
    """Gate over a score of the checkpoint's card; a card without scores says so."""
    found = stored.scores.get(score)
    return Gate(
        name=f"card: {name}", passed=found is None or bounds[0] <= found <= bounds[1],
        found="not on the card" if found is None else f"{found:.2f}", needed=f"{bounds[0]:g} to {bounds[1]:g}",
    )  # fmt: skip


def _like_card(stored: Stored, valid: Sequence[Valid], gates: Gates) -> list[Gate]:
    """Gates over the statistics of the ensemble against those on the checkpoint's card."""
    total = added(receipt.sums for _, receipt in valid)
    cells = stored.factor.space**2 * stored.factor.time * stored.members * len(stored.coarse)
    enough = total.get("under", 0.0) >= JUDGED * cells
    found = statistics(total) if enough else {}
    return [_like(name, found.get(name), stored.statistics.get(name), gates.like_card) for name in STATISTICS]


def _like(name: str, found: float | None, expected: float | None, gates: LikeCard) -> Gate:
    """Gate over one statistic; one that the card or the ensemble lacks is not judged, and the report says why."""
    low, high = getattr(gates, name)
    needed = f"{low:g} to {high:g} times the card's"
    if expected is None:
        return Gate(name=f"like card: {name}", passed=True, found="not judged: not on the card", needed=needed)
    if found is None:
        why = f"not judged: fewer than {JUDGED} wet coarse cells and steps, or a single member or step"
        return Gate(name=f"like card: {name}", passed=True, found=why, needed=needed)
    return Gate(
        name=f"like card: {name}", passed=low * expected <= found <= high * expected,
        found=f"{found:.3f}, on the card {expected:.3f}", needed=needed,
    )  # fmt: skip
