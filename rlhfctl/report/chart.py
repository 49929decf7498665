"""Line charts as inline SVG: no script, no request, colours from the page's style sheet."""

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
MOST_POINTS = 600  # of one line: more cannot be seen
COLOURS = 8  # classes line0 .. line7 of the style sheet

Line = tuple[str, Sequence[tuple[float, float]]]
Band = Sequence[tuple[float, float, float]]


def chart(title: str, lines: Sequence[Line], bands: Sequence[Band] = (), legend: bool = False) -> str:
    """One figure; lines: (label, points), at least one with a point; a line without any keeps its colour.

    bands: of each line the (x, low, high) around it. Points are shown where a line has few. legend: name the lines
    below; without it they are the runs of the page's head."""
    points = [point for _, line in lines for point in line]
    points += [(x, y) for band in bands for x, *edges in band for y in edges]
    xs, ys = ticks(*span(x for x, _ in points)), ticks(*span(y for _, y in points))
    low_x, high_x = min(xs[0], min(x for x, _ in points)), max(x for x, _ in points)
    xs = [x for x in xs if x <= high_x]  # a curve reaches the right edge: steps end where they end
    low_y, high_y = min(ys[0], min(y for _, y in points)), max(ys[-1], max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in ys:
        height = place(low_x, y)[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{number(y)}</text>')
    for x in xs:
        across = place(x, low_y)[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(x)}</text>')
    for index, band in enumerate(bands):
        if band:
            kept = band[:: math.ceil(len(band) / MOST_POINTS)]
            edge = [place(x, low) for x, low, _ in kept] + [place(x, high) for x, _, high in reversed(kept)]
            where = " ".join(f"{across:.1f},{height:.1f}" for across, height in edge)
            parts.append(f'<polygon class="band{index % COLOURS}" points="{where}"/>')
    for index, (label, line) in enumerate(lines):
        if not line:
            continue
        thinned = thin(line)
        where = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in thinned)
        parts.append(
            f'<polyline class="line{index % COLOURS}" points="{where}"><title>{escape(label)}</title></polyline>'
        )
        if len(thinned) <= 12:
            for x, y in thinned:
                across, height = place(x, y)
                parts.append(
                    f'<circle class="dot{index % COLOURS}" cx="{across:.1f}" cy="{height:.1f}" r="2.4">'
                    f"<title>{escape(label)} step {number(x)}: {number(y)}</title></circle>"
                )
    parts.append("</svg>")
    names = [
        f"<span class='name'><span class='key key{index % COLOURS}'></span>{escape(label)}</span> "
        for index, (label, line) in enumerate(lines)
        if line and legend
    ]
    below = f"<p class='quiet'>{''.join(names)}</p>" if names else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}{below}</figure>"


def span(values: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest; apart even where all values are one."""
    found = list(values)
    low, high = min(found), max(found)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    return low, high


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MOST_POINTS points, lowest and highest of each stretch kept: a spike stays in sight."""
    if len(line) <= MOST_POINTS:
        return list(line)
    size = math.ceil(len(line) / (MOST_POINTS / 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(line), size):
        part = line[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:.4g}" if value != int(value) else str(int(value))
