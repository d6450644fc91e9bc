"""What a run shows: pictures and plain-text tables made from plain records."""

import textwrap

import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.ticker

BLUE, GREY = '#2f6db3', '#8a8a8a'
_MOST_TICKS = 8  # values that are written at an axis, each


def axes_of(width, height, *, rows=1, columns=1):
  """Returns a figure of so many inches that no display needs, and its axes."""
  figure = matplotlib.figure.Figure(
    figsize=(width, height), layout='constrained', dpi=150
  )
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(color='0.92')
    axis.set_axisbelow(True)
  return figure, axes


def frontier_png(points, path, *, reward='reward'):
  """Draws reward against sequence KL, in the order of the points.

  Args:
    points: dicts with 'kl' (nats) and 'reward', optionally 'kl_se' and
      'reward_se' (standard errors, drawn as bars of two) and 'label'. The
      first and the last are labelled 'start' and 'end' unless they have one.
    path: of the PNG.
    reward: what the reward is called on the axis.
  """
  if not points:
    raise ValueError('a frontier needs at least one point')
  figure, (axis,) = axes_of(6, 4.2)
  kls, values = [[p[k] for p in points] for k in ('kl', 'reward')]
  axis.plot(kls, values, color=BLUE, linewidth=1.5, zorder=2)
  draw_frontier(
    axis,
    points,
    color=BLUE,
    ecolor=GREY,
    elinewidth=1,
    capsize=2,
    markersize=5,
    zorder=3,
  )
  labels = [p.get('label', '') for p in points]
  labels[0] = labels[0] or 'start'
  labels[-1] = labels[-1] or ('end' if len(points) > 1 else '')
  for kl, value, label in zip(kls, values, labels, strict=True):
    axis.annotate(
      label,
      (kl, value),
      xytext=(7, -13),
      textcoords='offset points',
      fontsize=9,
    )
  axis.margins(0.12)
  axis.set_xlabel('sequence KL to the reference (nats)')
  axis.set_ylabel(reward)
  _note_bars(axis, points)
  figure.savefig(path)


def draw_frontier(axis, points, **style):
  """Draws the points of `frontier_png`, without a line between them.

  style: of matplotlib's `errorbar`.
  """
  axis.errorbar(
    [p['kl'] for p in points],
    [p['reward'] for p in points],
    xerr=[2 * p.get('kl_se', 0.0) for p in points],
    yerr=[2 * p.get('reward_se', 0.0) for p in points],
    fmt='o',
    **style,
  )


def _note_bars(axis, points):
  if any(name.endswith('_se') for p in points for name in p):
    axis.set_title(
      'bars: two standard errors', loc='right', fontsize=8, color=GREY
    )


def curves_png(records, path, *, keys):
  """Draws one panel a key over the steps; `key_se` becomes a band of two.

  Args:
    records: metrics dicts with 'step'; a record may miss any key.
    path: of the PNG.
    keys: which to draw, such as 'train/loss'; unseen ones leave no panel. A
      key recorded often is drawn with its running mean.
  """
  seen = [key for key in keys if any(key in r for r in records)]
  if not seen:
    raise ValueError(f'no record has any of {list(keys)}; nothing to draw')
  columns = 2 if len(seen) > 1 else 1
  rows = -(-len(seen) // columns)
  figure, axes = axes_of(
    4.5 * columns, 2.4 * rows + 0.3, rows=rows, columns=columns
  )
  for axis, key in zip(axes, seen):
    _draw_curve(axis, [r for r in records if key in r], key)
  for axis in axes[len(seen) :]:
    axis.remove()
  figure.savefig(path)


def _draw_curve(axis, records, key):
  steps, values = [r['step'] for r in records], [r[key] for r in records]
  axis.set_title(key, loc='left', fontsize=10)
  axis.set_xlabel('step', fontsize=9)
  axis.tick_params(labelsize=8)
  axis.xaxis.set_major_locator(
    matplotlib.ticker.MaxNLocator(nbins=6, integer=True)
  )
  window = len(values) // 10
  if window < 2:
    axis.plot(steps, values, '.-', color=BLUE, linewidth=1.5, markersize=6)
  else:
    axis.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.35)
    means = [
      sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window)
      for i in range(len(values))
    ]
    axis.plot(steps, means, color=BLUE, linewidth=1.6)
  if all(f'{key}_se' in r for r in records):
    errors = [2 * r[f'{key}_se'] for r in records]
    axis.fill_between(
      steps,
      [v - e for v, e in zip(values, errors, strict=True)],
      [v + e for v, e in zip(values, errors, strict=True)],
      color=BLUE,
      alpha=0.15,
      linewidth=0,
    )


def lines_png(panels, path, *, xlabel):
  """Draws one panel a quantity, a line a series, with bars of two errors.

  Args:
    panels: {title: {label: [(x, mean, standard error or None), ...]}}, in
      the order of x. Where x spans a factor of ten or more, its axis is
      logarithmic.
    path: of the PNG.
    xlabel: what x is.
  """
  if not panels:
    raise ValueError('lines need at least one panel')
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  figure, axes = axes_of(
    4.5 * columns, 3 * rows + 0.3, rows=rows, columns=columns
  )
  labels = list(
    dict.fromkeys(label for lines in panels.values() for label in lines)
  )
  styles = {label: _style(i) for i, label in enumerate(labels)}
  for axis, (title, lines) in zip(axes, panels.items()):
    axis.set_title(title, loc='left', fontsize=10)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.tick_params(labelsize=8)
    xs = [x for points in lines.values() for x, _, _ in points]
    if min(xs) > 0 and max(xs) >= 10 * min(xs):
      axis.set_xscale('log')
    ticks = sorted(set(xs))
    if len(ticks) <= _MOST_TICKS:
      axis.set_xticks(ticks, [f'{x:g}' for x in ticks])
      axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    for label, points in lines.items():
      axis.errorbar(
        [x for x, _, _ in points],
        [mean for _, mean, _ in points],
        yerr=[2 * (error or 0.0) for _, _, error in points],
        label=label,
        capsize=2,
        elinewidth=1,
        linewidth=1.5,
        markersize=4,
        **styles[label],
      )
    if any(error for points in lines.values() for _, _, error in points):
      axis.set_title(
        'bars: two standard errors', loc='right', fontsize=7, color=GREY
      )
  for axis in axes[len(panels) :]:
    axis.remove()
  if any(labels):
    handles = {}
    for axis in axes[: len(panels)]:
      handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
      [handles[label] for label in labels],
      labels,
      loc='outside lower center',
      ncols=min(3, len(labels)),
      fontsize=8,
      frameon=False,
    )
  figure.savefig(path)


def _style(index):
  # Ten colours, then the same with another marker and dashes.
  again = index // 10
  return {
    'color': f'C{index % 10}',
    'marker': 'osv^D'[again % 5],
    'linestyle': ('-', '--', ':', '-.')[again % 4],
  }


def markdown_table(rows, *, aligned=True):
  """Returns rows of texts, the first of them titles, as Markdown.

  aligned: whether cells are padded to the longest of their column.
  """
  first, *others = [[cell.replace('|', '\\|') for cell in row] for row in rows]
  widths = [
    max(map(len, column)) if aligned else 0 for column in zip(first, *others)
  ]

  def line(cells):
    padded = [cell.ljust(n) for cell, n in zip(cells, widths, strict=True)]
    return f'| {" | ".join(padded)} |'

  rule = line(['-' * (n or 3) for n in widths])
  return '\n'.join([line(first), rule, *map(line, others)]) + '\n'


def text_table(rows, *, width=100):
  """Returns example texts before and after, side by side, in plain text.

  Args:
    rows: dicts with 'prompt', 'before', 'after' (responses), 'before_reward'
      and 'after_reward'.
    width: of the table, in characters.
  """
  column = (width - 3) // 2
  lines = []
  for row in rows:
    cells = []
    for side in ('before', 'after'):
      # A response is one paragraph here, whatever lines it was written in.
      text = ' '.join(row[side].split()) or '(empty)'
      cells.append(
        [
          f'{side} {row[f"{side}_reward"]:+.2f}',
          *textwrap.wrap(text, column),
        ]
      )
    height = max(map(len, cells))
    left, right = [c + [''] * (height - len(c)) for c in cells]
    lines.append('=' * width)
    lines += textwrap.wrap(row['prompt'], width)
    lines.append('-' * width)
    lines += [
      f'{a:<{column}} | {b}'.rstrip() for a, b in zip(left, right, strict=True)
    ]
  return '\n'.join([*lines, '=' * width]) + '\n'


# Metric, what it is called, format; a metric that is missing has no line.
_SUMMARY = (
  ('reward', 'mean reward', '+.3f'),
  ('cost', 'mean cost', '.3f'),
  ('kl', 'sequence KL (nats)', '.2f'),
  ('length', 'mean length (tokens)', '.1f'),
  ('ended', 'ended by EOS (share)', '.2f'),
  ('distinct_2', 'distinct-2', '.3f'),
)


def summary(before, after):
  """Returns the numbers before and after, with their standard errors.

  Args:
    before: {'reward': ..., 'reward_se': ..., 'kl': ..., 'length': ...,
      'ended': ..., 'distinct_2': ...}; `*_se` are standard errors, any may be
      missing.
    after: the same of the trained policy.
  """

  def cell(values, name, form):
    if name not in values:
      return '-'
    text = format(values[name], form)
    if f'{name}_se' in values:
      text += f' ± {format(values[f"{name}_se"], form.lstrip("+"))}'
    return text

  rows = [('', 'before', 'after', 'change')]
  for name, title, form in _SUMMARY:
    if name in before or name in after:
      change = '-'
      if name in before and name in after:
        difference = after[name] - before[name]
        change = format(difference, '+' + form.lstrip('+'))
      rows.append(
        (title, cell(before, name, form), cell(after, name, form), change)
      )
  first, *others = (max(map(len, column)) for column in zip(*rows))
  lines = [
    '  '.join(
      [
        row[0].ljust(first),
        *(text.rjust(n) for text, n in zip(row[1:], others, strict=True)),
      ]
    ).rstrip()
    for row in rows
  ]
  return '\n'.join(lines) + '\n'
