"""Draws the figures as an SVG: how far each one is above or below its target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from bench.figures import Figure, show_ratio, show_value

_WIDTH: Final = 1080
_LABELS: Final = 430
_PLOT: Final = 300
_ROW: Final = 26
_TOP: Final = 64
_FURTHEST: Final = 4.0
"""The plot reaches from a quarter of the target to four times the target; what is further is cut."""
_MET, _MISSED, _INK, _FAINT = "#2e7d4f", "#c0392b", "#1f2328", "#8c959f"


def draw(figures: Sequence[Figure]) -> str:
    """Return the chart."""
    height = _TOP + _ROW * len(figures) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 26, "telemetryd against its targets", size=16),
        _text(16, 46, "right of the line: better than the target; each step is a factor of two", _FAINT),
    ]
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        is_target = factor == 1
        parts.append(
            f'<line x1="{_x(factor):.1f}" x2="{_x(factor):.1f}" y1="{_TOP - 4}" y2="{height - 20}" '
            f'stroke="{_INK if is_target else "#d8dee4"}" stroke-width="{1.5 if is_target else 1}"/>'
        )
    parts.append(_text(_x(1), height - 6, "target", anchor="middle"))
    for number, figure in enumerate(figures):
        parts += _row(figure, _TOP + _ROW * number)
    return "\n".join([*parts, "</svg>\n"])


def _row(figure: Figure, top: int) -> list[str]:
    colour = _MET if figure.is_met else _MISSED
    start, end = sorted((_x(1), _x(figure.headroom)))
    middle = top + 15
    ratio = show_ratio(figure.ratio, figure.target)
    value = f"{ratio}{' of' if ratio.endswith('%') else ''} {figure.reference.name} ({figure.target})"
    return [
        _text(_LABELS - 8, middle, _shorten(figure.load), anchor="end"),
        f'<rect x="{start:.1f}" y="{top + 4}" width="{max(end - start, 1.5):.1f}" height="15" rx="2" fill="{colour}">'
        f"<title>{escape(show_value(figure.reached.median, figure.unit))}, {escape(figure.reference.name)} "
        f"{escape(show_value(figure.reference.median, figure.unit))}</title></rect>",
        _text(_LABELS + _PLOT + 12, middle, value, colour),
    ]


def _x(headroom: float) -> float:
    bounded = min(max(headroom, 1 / _FURTHEST), _FURTHEST)
    return _LABELS + _PLOT * (math.log(bounded, _FURTHEST) + 1) / 2


def _text(x: float, y: float, text: str, colour: str = _INK, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _shorten(label: str) -> str:
    return label if len(label) <= 68 else label[:67] + "…"
