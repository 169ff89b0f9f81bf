"""From a product of catalog.yaml to its plan, and what the plan costs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.errors import ConfigurationError
from stsr_core.regrid import coarse_grid, read_onto, regrid_time
from stsr_core.statics import static_fields
from stsr_core.store.receipts import read_receipts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stsr_core.checkpoint import Library
    from stsr_core.configuration import Product, TargetGrid
    from stsr_core.factors import Factor, Match
    from stsr_core.sources.cube import Cube
    from stsr_core.sources.harmonise import Reading
    from stsr_core.statics import StaticSource

BYTES_PER_CELL = 2  # uncompressed


def to_lattice(reading: Reading, target: TargetGrid, factor: Factor) -> tuple[Cube, ...]:
    """Read a source and regrid it conservatively onto the coarse lattice of a target grid and factor.

    Returns:
        A cube for each driving member.

    Raises:
        SourceError: values that cannot be read safely.
        GridError: the source does not cover the target, or its steps do not fit.
    """
    step = timedelta(hours=target.fine_step_h) * factor.time
    return tuple(regrid_time(cube, step) for cube in read_onto(reading, coarse_grid(target, factor)))


def plan_product(
    cubes: tuple[Cube, ...], found: Match, library: Library, product: Product, statics: Mapping[str, StaticSource]
) -> Plan:
    """Plan the ensemble of a product over the cubes of its driving members on the lattice of the matched factor."""
    return planned(
        cubes, found.factor, library, seed=product.seed, members=product.members, conserve=product.conserve,
        statics=statics,
    )  # fmt: skip


def planned(
    cubes: tuple[Cube, ...],
    factor: Factor,
    library: Library,
    *,
    seed: int,
    members: int,
    conserve: bool,
    statics: Mapping[str, StaticSource],
) -> Plan:
    """Plan an ensemble over the cubes of driving members, by the checkpoint that serves the factor.

    `statics` says where the static fields are that the checkpoint may need.
    """
    checkpoint, grid = library.serving(factor), cubes[0].grid.refine(factor.space)
    served = checkpoint.card.serving(factor, grid.spacing_km)
    recipe = Recipe.of(checkpoint, served, seed=seed, members=members, conserve=conserve)
    return Plan(cubes, recipe, static_fields(checkpoint.card.statics, statics, grid))


def attempt_name(plan: Plan, fingerprint: str, after: str) -> str:
    """Name of the attempt at a version, in 12 hexadecimal digits: a digest of all that determines its bytes.

    Args:
        plan: what is made.
        fingerprint: of the source.
        after: version that it follows.
    """
    bounds = plan.cube.times.bounds
    identity = [
        fingerprint, after, str(bounds[0, 0]), str(bounds[-1, 1]), plan.origin, plan.fine_shape,
        plan.recipe.identity(), plan.task(plan.shards[0]).digest,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(identity, default=str).encode())
    if plan.statics is not None:
        name.update(np.ascontiguousarray(plan.statics, dtype="<f4").tobytes())
    for cube in plan.cubes:
        name.update(cube.driving.encode())
        name.update(np.ascontiguousarray(cube.amount, dtype="<f4").tobytes())
    return name.hexdigest()[:12]


def made_before(plan: Plan, url: str, array: str, options: Mapping[str, object]) -> int:
    """Count the shards of a plan that receipts at a URL vouch for; their bytes are not read."""
    receipts = read_receipts(url, array, options)
    if not receipts:
        return 0
    return sum(t.shard.key in receipts and receipts[t.shard.key].plan_digest == t.digest for t in plan.tasks())


@dataclass(frozen=True)
class Cost:
    """What a plan takes.

    Attributes:
        shards: their number.
        dry: shards that need no network.
        skipped: share of all windows that need no network.
        evaluations: network evaluations on windows.
        cell_evaluations: fine cell-steps of all of them.
        bytes: size of the ensemble, uncompressed; rain packs about 3 to 10 times smaller.
        device_hours: estimate at the rate that `stsr bench` measures.
    """

    shards: int
    dry: int
    skipped: float
    evaluations: int
    cell_evaluations: int
    bytes: int
    device_hours: float

    @classmethod
    def of(cls, plan: Plan, device_rate: float) -> Cost:
        """Cost of a plan at `device_rate` fine cell-evaluations per second and device."""
        cells = sum(plan.cell_evaluations(shard) for shard in plan.shards)
        members, nt, ny, nx = plan.fine_shape
        return cls(
            shards=len(plan.shards),
            dry=sum(plan.is_dry(shard) for shard in plan.shards),
            skipped=plan.skipped,
            evaluations=sum(plan.evaluations(shard) for shard in plan.shards),
            cell_evaluations=cells,
            bytes=BYTES_PER_CELL * members * nt * ny * nx,
            device_hours=cells / device_rate / 3600,
        )

    def rows(self, price_per_device_hour: float = 0.0) -> list[tuple[str, str]]:
        """Name and value of every figure, for people."""
        rows = [
            ("shards", f"{self.shards}"),
            ("dry shards", f"{self.dry}"),
            ("dry windows, skipped", f"{self.skipped:.0%}"),
            ("network evaluations", f"{self.evaluations}"),
            ("ensemble, uncompressed", f"{_short(self.bytes / 1e9)} GB"),
            ("device hours", _short(self.device_hours)),
        ]
        if price_per_device_hour:
            rows.append(("cost", f"{self.device_hours * price_per_device_hour:.2f}"))
        return rows

    def check(self, limit: float | None) -> None:
        """Refuse a plan above a limit of device hours.

        Raises:
            ConfigurationError: it is above.
        """
        if limit is not None and self.device_hours > limit:
            raise ConfigurationError(
                f"The plan takes about {_short(self.device_hours)} device hours, more than the limit of {limit:g}. "
                "Plan fewer members, a shorter period or a smaller grid, or raise STSR_MAX_DEVICE_HOURS."
            )


def _short(value: float) -> str:
    """A figure for people: three digits that count, 0.0334 and 1230 alike."""
    return f"{float(f'{value:.3g}'):g}"
