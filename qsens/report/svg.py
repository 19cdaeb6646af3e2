"""Charts of the Markdown reports: small SVG files, text escaped, no script."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import escape

from qsens.report import format as look
from qsens.report.charts import DepthMap, column_name
from qsens.report.views import Heat

_STEPS = ("#f0f4f9", "#d9e5f2", "#b5cfe8", "#8fbae0", "#62a0d4", "#276aa6", "#0d4480")
_INK, _SOFT, _NONE = "#18202c", "#566173", "#ffffff"
_HEAT_ROWS = 40


def depth_svg(view: DepthMap | None) -> str | None:
    """Return the heat map of kinds by depth; none where there is nothing to show."""
    if view is None:
        return None
    labels = [str(depth) if depth % 5 == 0 else "" for depth in view.depths]
    return _heat_map(
        "Share of the total sensitivity by kind of module and depth, log scale",
        [kind for kind, _ in view.kinds],
        labels,
        [shares for _, shares in view.kinds],
        view.top,
        cell=(max(8, min(28, 900 // len(labels))), 26),
        left=80,
        upright=True,
    )


def heat_svg(view: Heat | None) -> str | None:
    """Return the heat map of the first groups by pairs; none where there is nothing to show."""
    if view is None or not view.rows:
        return None
    rows = view.rows[:_HEAT_ROWS]
    return _heat_map(
        f"Share of each pair's total sensitivity, size {view.size}, log scale",
        [look.shown(name, 64) for name, _ in rows],
        [look.shown(column_name(cell), 24) for cell in view.cells],
        [[row.share if row else None for row in cells] for _, cells in rows],
        view.top,
        cell=(34, 16),
        left=12 + max(len(look.shown(name, 64)) for name, _ in rows) * 7,
        upright=False,
    )


def _heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    top: float,
    *,
    cell: tuple[int, int],
    left: int,
    upright: bool,
) -> str:
    wide, high = cell
    head = 34 if upright else 40 + 7 * max(map(len, columns), default=0)
    width = left + wide * len(columns) + 24
    height = head + high * len(rows) + (24 if upright else 8)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 520)} {height}" '
        f'width="{max(width, 520)}" height="{height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="100%" height="100%" fill="{_NONE}"/>',
        f'<text x="8" y="18" fill="{_INK}" font-size="13">{escape(title)}</text>',
    ]
    for at, name in enumerate(columns):
        x = left + wide * at + wide / 2
        if upright:
            place = f'x="{x:g}" y="{height - 8}" text-anchor="middle"'
        else:
            place = f'transform="translate({x + 4:g} {head - 6}) rotate(-90)"'
        if name:
            parts.append(f'<text {place} fill="{_SOFT}">{escape(name)}</text>')
    for line, (name, shares) in enumerate(zip(rows, values, strict=True)):
        y = head + high * line
        parts.append(
            f'<text x="{left - 8}" y="{y + high / 2 + 4:g}" text-anchor="end" '
            f'fill="{_INK}">{escape(name)}</text>'
        )
        for at, share in enumerate(shares):
            fill = _NONE if share is None else _STEPS[look.heat_level(share, top)]
            parts.append(
                f'<rect x="{left + wide * at}" y="{y}" width="{wide - 1}" height="{high - 1}" '
                f'fill="{fill}"><title>{escape(name)}, {escape(columns[at])}: '
                f"{look.percent(share)}</title></rect>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
