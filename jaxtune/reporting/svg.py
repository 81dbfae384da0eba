"""A panel of curves as an SVG that stands in a page: it takes the page's colours, and says in words what it shows.

The page's style gives `.line0` to `.line5` their colours, and `.grid` and `.axis` theirs.
"""

import math
from collections.abc import Sequence
from html import escape

from jaxtune.reporting.curves import Panel, Points

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 24
"""Margins."""
COLOURS = 6
MOST_POINTS = 300
"""Of a line; those of a longer one are means over neighbours."""


def chart(panel: Panel) -> str:
    lines = {name: thinned(finite) for name, line in panel.lines.items() if (finite := _finite(line))}
    if not lines:
        return ""
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    (x_low, x_high), (y_low, y_high) = _range(xs, ()), _range(ys, y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_in_words(panel.title, lines))}">'
    ]
    for tick in y_ticks:
        _, down = place(x_low, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {down}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{tick:.6g}</text>')
    for tick in (tick for tick in x_ticks if x_low <= tick <= x_high):
        right, _ = place(tick, y_low)
        parts.append(
            f'<text class="axis" x="{right}" y="{HEIGHT - 6}" text-anchor="middle">{tick:.6g}</text>'
        )
    for number, line in enumerate(lines.values()):
        places = [place(x, y) for x, y in line]
        colour = f"line{number % COLOURS}"
        if len(places) == 1:
            parts.append('<circle class="{}" cx="{}" cy="{}" r="3"/>'.format(colour, *places[0]))
        else:
            path = "L".join(f"{right} {down}" for right, down in places)
            parts.append(f'<path class="{colour}" d="M{path}"/>')
    return "".join([*parts, "</svg>"])


def _in_words(title: str, lines: dict[str, Points]) -> str:
    each = [
        f"{name} goes from {line[0][1]:.4g} at step {line[0][0]:.6g} to {line[-1][1]:.4g} at step {line[-1][0]:.6g}"
        for name, line in lines.items()
    ]
    return f"{title}: {'; '.join(each)}"


def thinned(line: Points, most: int = MOST_POINTS) -> Points:
    every = -(-len(line) // most)
    pieces = [line[i : i + every] for i in range(0, len(line), every)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` or below to `high` or above."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= span / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, max(last, first + 1) + 1)]


def _range(values: Sequence[float], ticks: Sequence[float]) -> tuple[float, float]:
    low, high = min(*values, *ticks, math.inf), max(*values, *ticks, -math.inf)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _finite(line: Points) -> Points:
    return [(x, y) for x, y in line if math.isfinite(y)]
