"""Charts as SVG: strings that a page or a file can hold, and that need nothing else.

Colours are names of CSS variables, so that a page decides them for its light and its
dark theme. Series differ by their markers and dashes as well, so that charts can be
read without colour.
"""

from collections.abc import Sequence
import html
import math
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2128; --soft: #57606a;
  --line: #d0d7de; --s0: #0b62b5; --s1: #a6430d; --s2: #1a7f37; --s3: #7a3fb5; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6edf3;
  --soft: #a3adb8; --line: #363d46; --s0: #79b8ff; --s1: #ffa868; --s2: #6fdc8c;
  --s3: #d2a8ff; } }
svg text { fill: var(--soft); font-size: 12px; font-family: system-ui, sans-serif; }
.grid { stroke: var(--line); fill: none; }
.line { fill: none; stroke-width: 2; }
.mark { fill: var(--page); stroke-width: 2; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); }
.s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
"""
"""The colours of charts in a light and a dark theme."""

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 24, 36
_MARKERS = ('circle', 'square', 'triangle', 'diamond')
_DASHES = ('', '6 3', '2 3', '8 3 2 3')


class Series(NamedTuple):
  """Points of one kind in a chart.

  Attributes:
    name: of the series, for the legend.
    x: coordinates.
    y: coordinates, as many.
    line: whether points are joined.
    markers: whether points are marked.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  line: bool = True
  markers: bool = True


class Axis(NamedTuple):
  """An axis of a chart.

  Attributes:
    label: what it shows.
    low: the least coordinate.
    high: the greatest coordinate.
    log: whether equal distances are equal ratios.
    ticks: coordinates that have a label; None to choose some.
  """

  label: str
  low: float
  high: float
  log: bool = False
  ticks: Sequence[float] | None = None


def chart(
  series: Sequence[Series], x: Axis, y: Axis, *, title: str, legend: bool = True
) -> str:
  """Draws series in a frame with two axes.

  Args:
    series: what to draw; four kinds can be told apart.
    x: the horizontal axis.
    y: the vertical axis.
    title: what the chart shows, for those who hear it read.
    legend: whether to name the series below the chart.

  Returns:
    An `<svg>` element, and a legend.
  """
  across = _Scale(x, _LEFT, WIDTH - _RIGHT)
  up = _Scale(y, HEIGHT - _BOTTOM, _TOP)
  parts = []
  for tick in up.ticks():
    at = up(tick)
    parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
    parts.append(_text(_LEFT - 6, at + 4, _number(tick), anchor='end'))
  for tick in across.ticks():
    at = across(tick)
    parts.append(f'<path class="grid" d="M{at:.1f} {HEIGHT - _BOTTOM}v4"/>')
    parts.append(_text(at, HEIGHT - _BOTTOM + 16, _number(tick), anchor='middle'))
  parts.append(_text((WIDTH + _LEFT) / 2, HEIGHT - 4, x.label, anchor='middle'))
  parts.append(_text(2, 11, y.label))
  for i, own in enumerate(series):
    points = [(across(a), up(b)) for a, b in zip(own.x, own.y, strict=True)]
    if own.line and points:
      path = 'M' + 'L'.join(f'{a:.1f} {b:.1f}' for a, b in points)
      parts.append(
        f'<path class="line s{i % 4}" stroke-dasharray="{_DASHES[i % 4]}" d="{path}"/>'
      )
    if own.markers:
      parts += [marker(i, a, b) for a, b in points]
  return _svg(WIDTH, HEIGHT, parts, title) + (_legend(series) if legend else '')


def marker(index: int, x: float, y: float) -> str:
  """Draws the marker of the series with this index."""
  shape = _MARKERS[index % 4]
  name = f'class="mark s{index % 4}"'
  if shape == 'circle':
    return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
  corners = {
    'square': ((-3, -3), (3, -3), (3, 3), (-3, 3)),
    'triangle': ((0, -4.5), (4, 3), (-4, 3)),
    'diamond': ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
  }[shape]
  points = ' '.join(f'{x + a:.1f},{y + b:.1f}' for a, b in corners)
  return f'<polygon {name} points="{points}"/>'


def standalone(svg: str) -> str:
  """Returns an `<svg>` element as a picture of its own, with its colours."""
  start = svg.index('>') + 1
  end = svg.index('</svg>') + 6
  return f'{svg[:start]}<style>{STYLE}</style>{svg[start:end]}'


class _Scale:
  """Coordinates to places in a picture."""

  def __init__(self, axis: Axis, start: float, stop: float):
    self._axis, self._start, self._stop = axis, start, stop

  def __call__(self, value: float) -> float:
    low, high = self._axis.low, self._axis.high
    if self._axis.log:
      low, high = math.log(low), math.log(high)
      value = math.log(min(max(value, self._axis.low), self._axis.high))
    share = (value - low) / (high - low) if high > low else 0.5
    return self._start + share * (self._stop - self._start)

  def ticks(self) -> list[float]:
    """Some round coordinates."""
    axis = self._axis
    if axis.ticks is not None:
      return list(axis.ticks)
    if axis.log:
      first, last = round(math.log10(axis.low)), round(math.log10(axis.high))
      return [10.0**i for i in range(first, last + 1)]
    span = (axis.high - axis.low) or 1
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(x for x in (1, 2, 5, 10) if span / (step * x) <= 5)
    count = math.floor(axis.high / step + 1e-9)
    return [i * step for i in range(math.ceil(axis.low / step - 1e-9), count + 1)]


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
  name = html.escape(title)
  return (
    f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}" '
    f'xmlns="http://www.w3.org/2000/svg"><title>{name}</title>{"".join(parts)}</svg>'
  )


def _text(x: float, y: float, text: str, *, anchor: str = 'start') -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
  )


def _legend(series: Sequence[Series]) -> str:
  keys = []
  for i, own in enumerate(series):
    dash = f'stroke-dasharray="{_DASHES[i % 4]}"'
    line = f'<path class="line s{i % 4}" {dash} d="M1 7H27"/>' if own.line else ''
    mark = marker(i, 14, 7) if own.markers else ''
    picture = f'<svg viewBox="0 0 28 14" aria-hidden="true">{line}{mark}</svg>'
    keys.append(f'<span>{picture}{html.escape(own.name)}</span>')
  return f'<p class="legend">{"".join(keys)}</p>'


def _number(value: float) -> str:
  """A number in few characters."""
  if value and not 1e-3 <= abs(value) < 1e5:
    return f'{value:.0e}'.replace('e-0', 'e-').replace('e+0', 'e')
  return f'{value:.4g}'
