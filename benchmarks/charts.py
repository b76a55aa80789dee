"""Charts as SVG: self-contained strings for a page or a file.

Colours are CSS variables, so that a page sets them for its light and its dark theme.
Series also differ in their markers and dashes, so that charts can be read without
colour.
"""

from collections.abc import Sequence
import html
import itertools
import math
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2128; --soft: #57606a;
  --line: #d0d7de; --s0: #0b62b5; --s1: #da5e0d; --s2: #232b33; --s3: #560066;
  --s4: #b9727e; --s5: #6c260c; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6edf3;
  --soft: #a3adb8; --line: #363d46; --s0: #79b8ff; --s1: #ff8c63; --s2: #19ffaf;
  --s3: #b558ff; --s4: #b5afcc; --s5: #ffeb84; } }
svg text { fill: var(--soft); font-size: 12px; font-family: system-ui, sans-serif; }
.grid { stroke: var(--line); fill: none; }
.line { fill: none; stroke-width: 2; }
.mark { fill: var(--page); stroke-width: 2; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); }
.s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
.s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }
"""
"""The colours of charts in a light and a dark theme, also for the colour-blind."""

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 18, 24, 36
_MARKERS = ('circle', 'square', 'triangle', 'diamond', 'wedge', 'bar')
_DASHES = ('', '6 3', '2 3', '8 3 2 3', '1 2', '12 3')
_STYLES = len(_MARKERS)
_PAGE = '<rect width="100%" height="100%" style="fill: var(--page)"/>'


class Series(NamedTuple):
  """Points of one kind in a chart.

  Attributes:
    name: name of the series in the legend.
    x: horizontal coordinates of the points.
    y: vertical coordinates of the points.
    line: whether to join the points by lines.
    markers: whether to mark the points.
    labels: text beside each point, '' for none; None for no text.
    style: index of the colour, the dashes and the marker; None for the place among the
      series. The legend has one entry for all series of a name.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  line: bool = True
  markers: bool = True
  labels: Sequence[str] | None = None
  style: int | None = None


class Axis(NamedTuple):
  """An axis of a chart.

  Attributes:
    label: label of the axis.
    low: the least coordinate.
    high: the greatest coordinate.
    log: whether the axis is logarithmic.
    ticks: coordinates that have a label; None to choose them.
  """

  label: str
  low: float
  high: float
  log: bool = False
  ticks: Sequence[float] | None = None


def chart(
  series: Sequence[Series],
  x: Axis,
  y: Axis,
  *,
  title: str,
  legend: bool = True,
  inside: bool = False,
) -> str:
  """Draws series in a frame with two axes.

  Args:
    series: the series to draw. At most six can be distinguished.
    x: the horizontal axis.
    y: the vertical axis.
    title: a description of the chart for screen readers.
    legend: whether to name the series.
    inside: whether the names are in the lower left corner of the picture, so that it
      can stand alone. By default they are below it.

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
  places = [
    [(across(a), up(b)) for a, b in zip(own.x, own.y, strict=True)] for own in series
  ]
  labels = _Labels(places, [own.line for own in series])
  for k, (own, points) in enumerate(zip(series, places, strict=True)):
    i = k if own.style is None else own.style
    if own.line and points:
      path = 'M' + 'L'.join(f'{a:.1f} {b:.1f}' for a, b in points)
      parts.append(
        f'<path class="line s{i % _STYLES}" d="{path}" '
        f'stroke-dasharray="{_DASHES[i % _STYLES]}"/>'
      )
    if own.markers:
      parts += [marker(i, a, b) for a, b in points]
    parts += [
      labels.draw(k, point, label)
      for point, label in zip(points, own.labels or (), strict=False)
      if label
    ]
  if legend and inside:
    parts.append(_legend_inside(series))
  picture = _svg(WIDTH, HEIGHT, parts, title)
  return picture + (_legend(series) if legend and not inside else '')


def marker(index: int, x: float, y: float) -> str:
  """Draws the marker of the series with this index."""
  shape = _MARKERS[index % _STYLES]
  name = f'class="mark s{index % _STYLES}"'
  if shape == 'circle':
    return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
  corners = {
    'square': ((-3, -3), (3, -3), (3, 3), (-3, 3)),
    'triangle': ((0, -4.5), (4, 3), (-4, 3)),
    'diamond': ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
    'wedge': ((0, 4.5), (4, -3), (-4, -3)),
    'bar': ((-4.5, -1.5), (4.5, -1.5), (4.5, 1.5), (-4.5, 1.5)),
  }[shape]
  points = ' '.join(f'{x + a:.1f},{y + b:.1f}' for a, b in corners)
  return f'<polygon {name} points="{points}"/>'


def side_by_side(pictures: Sequence[str], title: str) -> str:
  """Returns charts without legends as one complete picture that has its colours."""
  placed = [
    picture.replace('<svg ', f'<svg x="{WIDTH * i}" width="{WIDTH}" ', 1)
    for i, picture in enumerate(pictures)
  ]
  parts = [f'<style>{STYLE}</style>', _PAGE, *placed]
  return _svg(WIDTH * len(pictures), HEIGHT, parts, title)


def standalone(svg: str) -> str:
  """Returns an `<svg>` element as a complete picture that contains its colours."""
  start = svg.index('>') + 1
  end = svg.index('</svg>') + 6
  return f'{svg[:start]}<style>{STYLE}</style>{_PAGE}{svg[start:end]}'


class _Labels:
  """Puts text beside points, in the frame, where it covers the least."""

  # Where a text begins or ends, relative to its point.
  SIDES = (
    (8, -6, 'start'),
    (8, 16, 'start'),
    (0, -10, 'middle'),
    (0, 19, 'middle'),
    (8, -18, 'start'),
    (-8, -6, 'end'),
    (-8, 16, 'end'),
    (-8, -20, 'end'),
    (10, 4, 'start'),
    (-10, 4, 'end'),
  )
  CHARACTER = 7  # the width of a character in the font of `STYLE`

  def __init__(self, places: Sequence[list[tuple[float, float]]], lines: list[bool]):
    self._places, self._lines = places, lines
    self._taken = [point for points in places for point in points]
    for points, joined in zip(places, lines, strict=True):
      for (a, b), (c, d) in itertools.pairwise(points) if joined else ():
        parts = [k / 16 for k in range(1, 16)]
        self._taken += [(a + k * (c - a), b + k * (d - b)) for k in parts]

  def draw(self, series: int, point: tuple[float, float], text: str) -> str:
    """Draws a text beside a point of a series."""
    width = self.CHARACTER * len(text)
    shift = {'start': 0.0, 'middle': width / 2, 'end': width}
    named = self._places[series] if self._lines[series] else [point]
    others = [x for own in self._places for x in own if x not in named]

    def covered(side: tuple[int, int, str]) -> int:
      left = point[0] + side[0] - shift[side[2]]
      low = point[1] + side[1]
      inside = lambda x, y: left - 5 < x < left + width + 5 and low - 15 < y < low + 6
      is_out = (
        left < _LEFT or left + width > WIDTH or not _TOP + 4 <= low < HEIGHT - _BOTTOM
      )
      # A text that is closer to another point seems to be of that one.
      from_text = lambda x, y: math.hypot(
        max(left - x, 0, x - left - width), max(low - 9 - y, 0, y - low)
      )
      own = min(from_text(*x) for x in named)
      closer = sum(from_text(*x) < own + 2 for x in others)
      return sum(inside(*x) for x in self._taken) + 20 * closer + 100 * is_out

    x, y, anchor = min(self.SIDES, key=covered)
    left = point[0] + x - shift[anchor]
    self._taken += [
      (left + k * width / 8, point[1] + y - h) for k in range(9) for h in (0, 3, 6, 9)
    ]
    return _text(point[0] + x, point[1] + y, text, anchor=anchor)


class _Scale:
  """A function from the coordinates of an axis to places in a picture."""

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
    """Returns the ticks of the axis, or chooses round coordinates."""
    axis = self._axis
    if axis.ticks is not None:
      return list(axis.ticks)
    if axis.log:
      first = math.ceil(math.log10(axis.low) - 1e-9)
      last = math.floor(math.log10(axis.high) + 1e-9)
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
  for i, own in _named(series):
    picture = f'<svg viewBox="0 0 28 14" aria-hidden="true">{_key(i, own)}</svg>'
    keys.append(f'<span>{picture}{html.escape(own.name)}</span>')
  return f'<p class="legend">{"".join(keys)}</p>'


def _legend_inside(series: Sequence[Series]) -> str:
  named = _named(series)
  top = HEIGHT - _BOTTOM - 4 - 16 * len(named)
  return ''.join(
    f'<g transform="translate({_LEFT + 6} {top + 16 * k})">{_key(i, own)}'
    f'{_text(34, 11, own.name)}</g>'
    for k, (i, own) in enumerate(named)
  )


def _named(series: Sequence[Series]) -> list[tuple[int, Series]]:
  """Returns the first series of each name, with its style."""
  found: dict[str, tuple[int, Series]] = {}
  for k, own in enumerate(series):
    found.setdefault(own.name, (k if own.style is None else own.style, own))
  return list(found.values())


def _key(index: int, series: Series) -> str:
  """Draws the line and the marker of a series, 28 by 14."""
  dash = f'stroke-dasharray="{_DASHES[index % _STYLES]}"'
  line = f'<path class="line s{index % _STYLES}" {dash} d="M1 7H27"/>'
  return (line if series.line else '') + (
    marker(index, 14, 7) if series.markers else ''
  )


def _number(value: float) -> str:
  """Formats a number in few characters."""
  if value and not 1e-3 <= abs(value) < 1e5:
    return f'{value:.0e}'.replace('e-0', 'e-').replace('e+0', 'e')
  return f'{value:.4g}'
