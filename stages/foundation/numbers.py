"""Numbers as people read them."""

from typing import Any

# From here on digits before the point are no longer read.
LARGEST = 1e7
# Of a loss, what a difference is by rounding: a strength of 0 gives the base by another way.
ROUNDING = 1e-6


def figure(value: Any) -> str:
    """A number of four significant digits, or, from a thousand on, of all before the point, thousands apart; other values as
    they are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < LARGEST else f"{value:.4g}"


def signed(value: float) -> str:
    """A difference of three significant digits, with its sign."""
    if value == 0:
        return "0"
    return f"{value:+,.0f}" if 1e3 <= abs(value) < LARGEST else f"{value:+.3g}"
