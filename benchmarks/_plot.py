"""Scatter plots as SVG, on logarithmic axes of one range, a panel for each series of points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import escape

_PANEL, _GAP, _LEFT, _TOP, _ACROSS = 220, 46, 64, 56, 4


def scatter(
    panels: Mapping[str, Sequence[tuple[float, float]]], title: str, across: str, up: str
) -> str:
    """Return an SVG of small panels; the line is where both values are the same.

    Args:
        panels: Points ``(x, y)`` by the panel's name; values that are not positive are left out.
        title: What stands above.
        across: What the horizontal axis is, unit included.
        up: What the vertical axis is, unit included.
    """
    shown = {
        name: [(x, y) for x, y in points if x > 0 and y > 0] for name, points in panels.items()
    }
    values = [value for points in shown.values() for point in points for value in point]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    rows = math.ceil(len(shown) / _ACROSS)
    width = _LEFT + min(_ACROSS, len(shown)) * (_PANEL + _GAP)
    height = _TOP + rows * (_PANEL + _GAP) + 24

    def at(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * _PANEL

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#18202c">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="{height - 10}">{escape(across)}</text>',
        f'<text transform="translate(16 {_TOP + _PANEL}) rotate(-90)">{escape(up)}</text>',
    ]
    for index, (name, points) in enumerate(shown.items()):
        left = _LEFT + index % _ACROSS * (_PANEL + _GAP)
        top = _TOP + index // _ACROSS * (_PANEL + _GAP)
        bottom = top + _PANEL
        parts.append(
            f'<text x="{left}" y="{top - 6}">{escape(name)}</text>'
            f'<rect x="{left}" y="{top}" width="{_PANEL}" height="{_PANEL}" fill="none" '
            f'stroke="#566173"/><line x1="{left}" y1="{bottom}" x2="{left + _PANEL}" y2="{top}" '
            'stroke="#566173" stroke-dasharray="4 3"/>'
        )
        for decade in range(low, high + 1):
            along = (decade - low) / (high - low) * _PANEL
            parts.append(
                f'<text x="{left + along:.1f}" y="{bottom + 14}" font-size="10" '
                f'text-anchor="middle">1e{decade}</text>'
                f'<text x="{left - 4}" y="{bottom - along + 3:.1f}" font-size="10" '
                f'text-anchor="end">1e{decade}</text>'
            )
        parts.extend(
            f'<circle cx="{left + at(x):.1f}" cy="{bottom - at(y):.1f}" r="2.5" fill="#0b6bb5" '
            'fill-opacity="0.6"/>'
            for x, y in points
        )
    return "\n".join([*parts, "</svg>", ""])
