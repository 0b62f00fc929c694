"""Charts as SVG text: no library draws them in the reader's browser."""

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 44
_CHARACTER = 6.2  # mean width of a character in a row of figures


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
    lines = [_finite(line, log_y) for line in series]
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    heights = [y for line in lines for y in (*line.y, *(y for _, y in _edge(line)))]
    axes = _Axes(
        *(x_range or _span([x for line in lines for x in line.x])),
        *(y_range or _padded(*_span(heights, log_y), log_y)),
        log_y,
    )
    parts = [*axes.grid(), axes.labels(x_label, y_label)]
    for line in lines:
        parts += _drawn(line, axes)
    label = escape(f"{y_label} over {x_label}", quote=True)
    return (
        f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{''.join(parts)}</svg>{_legend(lines)}"
    )


class _Axes(NamedTuple):
    """The axes of a chart of lines: their bounds, and whether the vertical one is logarithmic."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_y: bool

    def at_x(self, x: float) -> float:
        """A value's position in the picture."""
        part = (x - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + part * (WIDTH - _LEFT - _RIGHT)

    def at_y(self, y: float) -> float:
        """A value's position in the picture."""
        low, high = self.y_low, self.y_high
        if self.log_y:
            low, high, y = (math.log10(value) for value in (low, high, y))
        return HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def points(self, pairs: Iterable[tuple[float, float]]) -> str:
        """Pairs of values as the `points` of a polygon or polyline."""
        return " ".join(f"{self.at_x(x):.1f},{self.at_y(y):.1f}" for x, y in pairs)

    def grid(self) -> Iterator[str]:
        """Lines across the picture, with their values."""
        bounds = self.y_low, self.y_high
        for tick in log_ticks(*bounds) if self.log_y else ticks(*bounds):
            y = self.at_y(tick)
            yield (
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}'
                "</text>"
            )
        for tick in ticks(self.x_low, self.x_high):
            x, bottom = self.at_x(tick), HEIGHT - _BOTTOM
            yield (
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
                f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}'
                "</text>"
            )

    def labels(self, x_label: str, y_label: str) -> str:
        """What the axes show."""
        middle_x, middle_y = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
        return (
            f'<text class="label" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
            f'<text class="label" transform="translate(13 {middle_y}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )


def _drawn(line: Series, axes: _Axes) -> Iterator[str]:
    """The band, the line and the mark of a series."""
    color = f"s{line.color % 10}"
    if edge := axes.points(_edge(line)):
        yield f'<polygon class="band {color}" points="{edge}"/>'
    title = f"<title>{escape(line.name)}: {line.y[-1]:.4g} at {line.x[-1]:g}</title>"
    if len(line.x) > 1:
        points = axes.points(zip(line.x, line.y, strict=True))
        dashes = ' stroke-dasharray="5 4"' if line.is_dashed else ""
        yield f'<polyline class="line {color}"{dashes} points="{points}">{title}</polyline>'
    # A line of a single point would not be seen.
    mark = line.mark or ((line.x[0], line.y[0]) if len(line.x) == 1 else None)
    if mark:
        x, y = mark
        yield (
            f'<circle class="dot {color}" cx="{axes.at_x(x):.1f}" cy="{axes.at_y(y):.1f}" r="4">'
            f"{title}</circle>"
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
    margin = 16
    # The name and the figures of a row stand side by side if all rows have the room.
    longest = max(len(whisker.name) + len(whisker.text) for whisker in rows)
    second_line = 14 * (longest * _CHARACTER > WIDTH - 3 * margin)
    row = 40 + second_line
    bottom = row * len(rows) + 6
    ends = [x for whisker in rows for x in (whisker.value, *(whisker.interval or ()))]
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
    for i, whisker in enumerate(rows):
        y, color = row * i + 28 + second_line, f"s{whisker.color % 10}"
        parts.append(
            f'<text class="label" x="{margin}" y="{y - 12 - second_line}">'
            f"{escape(whisker.name)}</text>"
            f'<text class="tick" x="{WIDTH - margin}" y="{y - 12}" text-anchor="end">'
            f"{escape(whisker.text)}</text>"
            f'<circle class="dot {color}" cx="{at(whisker.value):.1f}" cy="{y}" r="4.5"/>'
        )
        if whisker.interval:
            left, right = map(at, whisker.interval)
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
    names = dict.fromkeys(
        (line.name, line.color % 10, line.is_dashed) for line in lines if line.name
    )
    if len(names) < 2:
        return ""
    entries = "".join(
        f'<span class="key"><i class="b{color}{" dashed" if is_dashed else ""}"></i>{escape(name)}'
        "</span>"
        for name, color, is_dashed in names
    )
    return f'<div class="legend">{entries}</div>'


def _finite(line: Series, log_y: bool) -> Series:
    points = [
        point
        for point in zip(line.x, line.y, line.spread or [0.0] * len(line.x), strict=True)
        if all(map(math.isfinite, point)) and (point[1] > 0 or not log_y)
    ]
    x, y, spread = ([point[i] for point in points] for i in range(3))
    return line._replace(x=x, y=y, spread=spread if line.spread else ())


def _edge(line: Series) -> list[tuple[float, float]]:
    """The corners of the band: from left to right above, and back below."""
    band = list(zip(line.x, line.y, line.spread, strict=True)) if line.spread else []
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
