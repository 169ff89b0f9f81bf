"""Statistics of an ensemble that need no truth: what it has that is finer than coarse cells, and how members differ.

They are ratios of sums that add up over shards, chosen because they say little of the weather: one checkpoint's are
much the same in drizzle and in thunderstorms, a broken one's are not. Detail is an amount minus the mean of its coarse
cell and step.

- `detail`: its size, over the differences between neighbouring coarse cells and steps.
- `members`, `hours`, `neighbours`: sum |a - b| over sum (|a| + |b|) of the detail a and b of the same cell in two
  members or in successive steps, or of neighbours inside a coarse cell: 0 where they are the same, 0.7 for independent
  noise of a normal distribution, 1 where they have nothing in common.
- `wet`: wet cells of wet coarse cells, over those there would be if every cell were either dry or as wet as the others.
  With H the Hoover index, half of the size of the detail over the amount, that share is 1 - H.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

WET_MM = 0.1  # amount per fine step above which a cell counts as wet
PAIRS = ("members", "hours", "neighbours")
PAIR = ("apart", "size")
STATISTICS = ("detail", *PAIRS, "wet")

Sums = dict[str, float]


def added(parts: Iterable[Mapping[str, float]]) -> Sums:
    """Add up the sums of parts of an ensemble."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def statistics(total: Mapping[str, float]) -> dict[str, float]:
    """Statistics of an ensemble by name; those that it is too small or too dry for are absent."""
    even = total["amount"] - total["size"] / 2
    wet = total["wet"] * total["amount"]
    parts = {
        "detail": (total["size"], total["change"]),
        **{name: (total[f"{name}_apart"], total[f"{name}_size"]) for name in PAIRS},
        "wet": (wet, total["under"] * even),
    }
    return {name: above / below for name, (above, below) in parts.items() if below > 0}
