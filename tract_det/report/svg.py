"""Charts as SVG text: no library draws them in the reader's browser."""

import math
from collections.abc import Iterable, Sequence
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
        spread: half the height of a band around the line at each x; () = no band.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    mark: tuple[float, float] | None = None
    is_dashed: bool = False
    spread: Sequence[float] = ()


class Whisker(NamedTuple):
    """A row of a chart of intervals.

    Attributes:
        name: above the whisker.
        value: where the dot is.
        interval: where the whisker ends; None = no whisker.
        text: the value in words, at the right.
        color: number of a colour, see the style sheet.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    text: str
    color: int = 0


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
    heights = [y for one in lines for y in (*one.y, *(y for _, y in _edge(one)))]
    y_low, y_high = y_range or _padded(*_span(heights, log_y), log_y)

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

    def points_of(pairs: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in pairs)

    for one in lines:
        if edge := points_of(_edge(one)):
            parts.append(f'<polygon class="band s{one.color % 10}" points="{edge}"/>')
        points = points_of(zip(one.x, one.y, strict=True))
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


def interval_chart(rows: Sequence[Whisker], *, x_label: str) -> str:
    """Dots with whiskers, one below the other, beside a line at 0.

    Args:
        rows: from above; values and ends of intervals are finite.
        x_label: what the axis shows, with its unit.

    Returns:
        An `<svg>` element, "" without rows.
    """
    if not rows:
        return ""
    row, margin = 40, 16
    bottom = row * len(rows) + 6
    ends = [x for one in rows for x in (one.value, *(one.interval or ()))]
    low, high = _span([0.0, *ends])

    def at(x: float) -> float:
        return margin + (x - low) / (high - low) * (WIDTH - 2 * margin)

    parts = []
    for tick in ticks(low, high):
        kind = "grid" if tick else "zero"
        parts.append(
            f'<line class="{kind}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="0" y2="{bottom}"/>'
            f'<text class="tick" x="{at(tick):.1f}" y="{bottom + 15}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for i, one in enumerate(rows):
        y, color = row * i + 28, f"s{one.color % 10}"
        parts.append(
            f'<text class="label" x="{margin}" y="{y - 12}">{escape(one.name)}</text>'
            f'<text class="tick" x="{WIDTH - margin}" y="{y - 12}" text-anchor="end">'
            f"{escape(one.text)}</text>"
            f'<circle class="dot {color}" cx="{at(one.value):.1f}" cy="{y}" r="4.5"/>'
        )
        if one.interval:
            left, right = map(at, one.interval)
            parts.append(
                f'<path class="line {color}" d="M{left:.1f} {y}H{right:.1f}M{left:.1f} {y - 5}v10'
                f'M{right:.1f} {y - 5}v10"/>'
            )
    parts.append(
        f'<text class="label" x="{WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return (
        f'<svg class="chart" role="img" aria-label="{escape(x_label, quote=True)}" '
        f'viewBox="0 0 {WIDTH} {bottom + 42}">{"".join(parts)}</svg>'
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
    points = [
        point
        for point in zip(one.x, one.y, one.spread or [0.0] * len(one.x), strict=True)
        if all(map(math.isfinite, point)) and (point[1] > 0 or not log_y)
    ]
    x, y, spread = ([point[i] for point in points] for i in range(3))
    return one._replace(x=x, y=y, spread=spread if one.spread else ())


def _edge(one: Series) -> list[tuple[float, float]]:
    """The corners of the band: from left to right above, and back below."""
    band = list(zip(one.x, one.y, one.spread, strict=True)) if one.spread else []
    return [(x, y + half) for x, y, half in band] + [(x, y - half) for x, y, half in band[::-1]]


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
