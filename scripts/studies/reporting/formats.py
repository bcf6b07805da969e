"""Write numbers, bounds and durations of studies for people."""

import math
import re

from scripts.studies.reporting.study import Claim

MAX_DECIMALS = 7
SMALLEST = 1e-100
TIMES = "\u00a0×\u00a0"  # no line break within a number
EXPONENTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, small and large ones as m × 10ⁿ.

    A number just below 1 gets as many digits as its distance from 1 needs: 0.999998. A number
    below 1e-100, which stands for the logarithm of zero somewhere, is 0.
    """
    if abs(value) < SMALLEST:
        return "0"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_plain(mantissa)}{TIMES}10{str(int(exponent)).translate(EXPONENTS)}"
    if 0.99 < abs(value) < 1:
        decimals = 1 - math.floor(math.log10(1 - abs(value)))
        return _plain(f"{value:.{min(decimals, MAX_DECIMALS)}f}")
    return _plain(f"{value:,.{max(0, digits - 1 - _magnitude(value))}f}")


def format_bound(claim: Claim) -> str:
    """Return the bound of a claim as text, such as `< 0.01`, with spaces that do not break."""
    sides = [f">\u00a0{format_number(claim.above)}"] * (claim.above > -math.inf)
    sides += [f"<\u00a0{format_number(claim.below)}"] * (claim.below < math.inf)
    return " and ".join(sides)


def strip_markdown(text: str) -> str:
    """Return Markdown without escapes, code signs and the addresses of links."""
    text = re.sub(r"(?<!\\)\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\\([\\*_|\[\]`])|[`]", r"\1", text)


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, or in minutes and seconds from 100 seconds on."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _plain(text: str) -> str:
    """Return the text of a number without zeros at its end, and with a minus sign."""
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")
