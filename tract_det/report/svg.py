"""Charts as SVG text: no library draws them in the reader's browser."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 44


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
        name: for the legend.
        x: positions.
        y: values; NaN and infinite ones are left out.
        mark: a point to be marked, (x, y); None = none.
        color: number of a colour, see the style sheet; lines of one run have the same.
        is_dashed: whether the line is dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    mark: tuple[float, float] | None = None
    is_dashed: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
) -> str:
    """Lines over a common axis, with ticks, a legend below and values as tooltips.

    Args:
        series: the lines; those without a finite value are left out.
        x_label: what the horizontal axis shows, with its unit.
        y_label: what the vertical axis shows, with its unit.
        log_y: whether the vertical axis is logarithmic; values that are not positive are left out.
        y_range: bounds of the vertical axis; None = those of the values.
        x_range: likewise.

    Returns:
        An `<svg>` element, "" where there is nothing to draw.
    """
    lines = [_finite(one, log_y) for one in series]
    lines = [one for one in lines if len(one.x)]
    if not lines:
        return ""
    x_low, x_high = x_range or _span([x for one in lines for x in one.x])
    y_low, y_high = y_range or _padded(*_span([y for one in lines for y in one.y], log_y), log_y)

    def at_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        low, high, y = (math.log10(v) for v in (y_low, y_high, y)) if log_y else (y_low, y_high, y)
        return HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in log_ticks(y_low, y_high) if log_y else ticks(y_low, y_high):
        y = at_y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in ticks(x_low, x_high):
        x, y = at_x(tick), HEIGHT - _BOTTOM
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y}"/>'
            f'<text class="tick" x="{x:.1f}" y="{y + 16}" text-anchor="middle">{tick:g}</text>'
        )
    middle_x, middle_y = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="label" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" transform="translate(13 {middle_y}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    for one in lines:
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(one.x, one.y, strict=True))
        dashes = ' stroke-dasharray="5 4"' if one.is_dashed else ""
        title = f"<title>{escape(one.name)}: {one.y[-1]:.4g} at {one.x[-1]:g}</title>"
        if len(one.x) > 1:
            parts.append(
                f'<polyline class="line s{one.color % 10}"{dashes} points="{points}">{title}'
                "</polyline>"
            )
        ends = [one.mark] if one.mark else [(one.x[0], one.y[0])] if len(one.x) == 1 else []
        for x, y in ends:
            parts.append(
                f'<circle class="dot s{one.color % 10}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" '
                f'r="4">{title}</circle>'
            )
    label = escape(f"{y_label} over {x_label}", quote=True)
    return (
        f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{''.join(parts)}</svg>{_legend(lines)}"
    )


def bar_chart(names: Sequence[str], values: Sequence[float], *, unit: str) -> str:
    """Horizontal bars, each with its value.

    Args:
        names: of the bars.
        values: not negative.
        unit: behind each value.
    """
    row, left = 26, 130
    height = row * len(names) + 4
    longest = max([*values, 1e-12])
    parts = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y = 2 + row * i
        width = max(0.0, value) / longest * (WIDTH - left - 90)
        parts.append(
            f'<text class="label" x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(name)}'
            "</text>"
            f'<rect class="bar" x="{left}" y="{y + 3}" width="{width:.1f}" height="{row - 8}"/>'
            f'<text class="tick" x="{left + width + 6:.1f}" y="{y + 17}">{value:+.2f} '
            f"{escape(unit)}</text>"
        )
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height}">{"".join(parts)}</svg>'
        if names
        else ""
    )


def _legend(lines: Sequence[Series]) -> str:
    names = dict.fromkeys((one.name, one.color % 10, one.is_dashed) for one in lines if one.name)
    if len(names) < 2:
        return ""
    entries = "".join(
        f'<span class="key"><i class="b{color}{" dashed" if is_dashed else ""}"></i>{escape(name)}'
        "</span>"
        for name, color, is_dashed in names
    )
    return f'<div class="legend">{entries}</div>'


def _finite(one: Series, log_y: bool) -> Series:
    pairs = [
        (x, y)
        for x, y in zip(one.x, one.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)
    ]
    return one._replace(x=[x for x, _ in pairs], y=[y for _, y in pairs])


def _span(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """The bounds of an axis: those of the values, apart from each other."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return low, high


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """The bounds with a little room, so that no line runs along the edge."""
    if log:
        factor = (high / low) ** 0.05
        return low / factor, high * factor
    return low - 0.05 * (high - low) * (low != 0), high + 0.05 * (high - low)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from low to high, about so many: multiples of 1, 2 or 5 times a power of 10."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(k * step, digits) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of 10 from low to high; where there are fewer than three, round numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**k for k in range(first, last + 1)]
    powers = powers[:: max(1, len(powers) // 6)]
    inside = [tick for tick in powers if low <= tick <= high]
    return inside if len(inside) > 2 else [tick for tick in ticks(low, high) if tick > 0]
