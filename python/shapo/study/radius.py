"""A radius at which a loss rises by a wanted amount."""

from __future__ import annotations

import math
from collections.abc import Callable

from shapo.errors import UserError


def match_radius(rise: Callable[[float], float], target: float, *, start: float = 0.05) -> tuple[float, float, int]:
    """A radius at which `rise` is `target`, to within a tenth: bracketed by factors of 4, then log-linear.

    Returns:
        The radius, the rise there, and how often `rise` was asked.

    Raises:
        UserError: No radius up to 1000 reaches it.
    """
    low, high, tried = (0.0, 0.0), (math.inf, math.inf), 0
    rho = start
    while tried < 16:
        found = rise(rho)
        tried += 1
        if abs(found - target) <= 0.1 * target:
            return rho, found, tried
        if math.isfinite(found) and found < target:
            low = (rho, found)
        else:
            high = (rho, found)
        if math.isinf(high[0]):
            rho *= 4
        elif low[1] <= 0:
            rho = high[0] / 4 if low[0] == 0 else math.sqrt(low[0] * high[0])
        else:
            part = (math.log(target) - math.log(low[1])) / (math.log(high[1]) - math.log(low[1]))
            rho = low[0] * (high[0] / low[0]) ** min(max(part, 0.1), 0.9)
        if rho > 1000:
            break
    raise UserError(f"no radius up to {rho:g} was found at which the loss rises by {target:g}")
