"""Joins all layers but the last into one group of choices, so that the planner's integer program is small.

Where many layers are alike, the program has a great many solutions that are nearly equally good, and a solver would
look at them one by one. So the choices of the layers are joined, one layer after the other. Most joint choices are
dominated by others, and most of the rest cannot be part of a best plan. A few thousand are left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BEAM = 256
"""How many joint choices are followed up to find a good plan."""

PRICE_STEPS = 64
"""Bisections for the price of a unit."""

ROUNDING = 1e-9
"""Relative errors of sums of sensitivities are smaller than this."""


@dataclass(frozen=True)
class Group:
    """The choices for some layers together, the smallest first. None of them is as large as another and as sensitive.

    `units` [N] are their bytes in units, `sensitivity` [N] the sums over the layers, and `picks` [N, layers] the
    indices of the layers' candidates.
    """

    units: npt.NDArray[np.int64]
    sensitivity: npt.NDArray[np.float64]
    picks: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.units)

    def only(self, which: npt.NDArray[np.int64]) -> Group:
        """The choices at these indices."""
        return Group(self.units[which], self.sensitivity[which], self.picks[which])

    def undominated(self) -> Group:
        """The choices that no other one dominates."""
        order = np.lexsort((self.sensitivity, self.units))
        least = np.minimum.accumulate(self.sensitivity[order])
        return self.only(order[np.append(True, least[1:] < least[:-1])])

    def at_price(self, price: float) -> npt.NDArray[np.float64]:
        """The sensitivity of each choice, plus its units at this price."""
        return self.sensitivity + price * self.units


def joined(groups: Sequence[Group], capacity: int) -> list[Group]:
    """All groups but the last as one, and the last. The best choice of at most `capacity` units stays possible.

    At any price of a unit, the sum of the groups' cheapest choices, less the price of the capacity, bounds the
    sensitivity of every plan from below. If a joint choice of some groups, with the cheapest choices of the others,
    raises this bound above the sensitivity of a known plan, then it belongs to no better plan.
    """
    price = _price(groups, capacity)
    worst = _good_plan(groups, price, capacity) + price * capacity
    worst += ROUNDING * abs(worst)
    smallest = _after([float(one.units.min()) for one in groups])
    cheapest = _after([float(one.at_price(price).min()) for one in groups])
    joint, *others = groups
    for number, other in enumerate(others[:-1], 1):
        both = _pair(joint, other)
        fits = both.units + smallest[number] <= capacity
        promises = both.at_price(price) + cheapest[number] <= worst
        joint = both.only((fits & promises).nonzero()[0]).undominated()
    return [joint, *others[-1:]]


def _after(least: Sequence[float]) -> list[float]:
    """For each group, the sum of `least` over the groups after it."""
    return [*itertools.accumulate(least[:0:-1], initial=0.0)][::-1]


def _pair(one: Group, other: Group) -> Group:
    """All joint choices of two groups."""
    first, second = (place.ravel() for place in np.indices((len(one), len(other))))
    return Group(
        one.units[first] + other.units[second],
        one.sensitivity[first] + other.sensitivity[second],
        np.concatenate([one.picks[first], other.picks[second]], axis=1),
    )


def _price(groups: Sequence[Group], capacity: int) -> float:
    """The lowest price of a unit at which the groups' cheapest choices fit the capacity, found by bisection."""
    low, high = 0.0, 1.0
    if _units(groups, low) <= capacity:
        return low
    while _units(groups, high) > capacity:
        high *= 2
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _units(groups, middle) <= capacity else (middle, high)
    return high


def _units(groups: Sequence[Group], price: float) -> int:
    """The units of the cheapest choices, the smaller one in a tie."""
    return sum(int(one.units[one.at_price(price).argmin()]) for one in groups)


def _good_plan(groups: Sequence[Group], price: float, capacity: int) -> float:
    """The sensitivity of a good plan: that of the best one if only the `BEAM` cheapest joint choices are followed up.

    One of these fits, because the cheapest choices of all groups do.
    """
    joint = groups[0]
    for other in groups[1:]:
        both = _pair(joint, other).undominated()
        joint = both.only(both.at_price(price).argsort(kind="stable")[:BEAM])
    return float(joint.sensitivity[joint.units <= capacity].min())
