"""Loss and gradient weight of every loss against margin, and their pictures.

A picture's setting: responses of TOKENS tokens, TYPICAL nats each under the
reference; docs/losses.md says the rest.
"""

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np

from dpo_jax.losses import choices
from dpo_jax.losses import scoring
from dpo_jax.losses import table

TOKENS, TYPICAL = 40, -80.0
# No log-prob gets positive: TYPICAL + 60 is the largest.
MARGINS = np.linspace(-60.0, 60.0, 241)
# How far each response of a group moves when the margin grows by one.
MOVES = {
  'pairs': (0.5, -0.5),
  'rankings': (0.5, 0.0, -0.5),
  'unpaired': (1.0,),
  'sft': (1.0,),
}
# Three more pairs of the batch, for losses that look at others: the margins
# log pi(yw) - log pi(yl), and the reference's.
OTHERS, OTHERS_REF = (-40.0, 0.0, 40.0), (-20.0, 0.0, 20.0)
# Labels p of the data, where a picture with p = 1 would not show the loss.
SOFT = {'soft': 0.8}


def trace(name, margins, *, p=1.0, level=0.0, **options):
  """Returns loss [M] and gradient weights [M, K] of one group of a batch.

  The loss is the batch's mean. The weights are -d/d log pi of the batch's sum,
  log pi the sum over a response's tokens, whatever the loss's reduction.
  """
  loss, function = table.get(name), table.make(name, **options)
  reduction = table.options(name, **options)['reduction']
  reduce = choices.choose(choices.REDUCTIONS, 'reduction', reduction)
  factor = reduce(jnp.arange(TOKENS), TOKENS, TOKENS, TOKENS).mean()
  if loss.head:  # of a score, not of a sum over tokens
    factor = 1.0
  moves = np.array(MOVES[loss.forms[0]] + (0.0,) * loss.mismatched)
  others, others_ref = (
    np.array(x if loss.batchwise else ())[:, None] * moves / 2
    for x in (OTHERS, OTHERS_REF)
  )
  ref_BK = TYPICAL + np.concatenate([0.0 * moves[None], others_ref])
  B, K = ref_BK.shape

  def total(policy_K):
    policy_BK = jnp.concatenate([policy_K[None], TYPICAL + others])
    scores = scoring.Scores(
      policy_BK * factor,
      ref_BK * factor,
      lengths=jnp.full((B, K), float(TOKENS)),
      p=jnp.full(B, p),
      mask=jnp.ones(B, bool),
      rewards=jnp.tile(-jnp.arange(K, dtype=float), (B, 1)),
      costs=jnp.tile(jnp.arange(K, dtype=float), (B, 1)),
      kls=jnp.ones((B, K)),
      complements=TOKENS * scoring.log_complement(policy_BK / TOKENS),
      memory={'mean': 0.0, 'count': 1e9},  # a past that one batch cannot move
    )
    return function(scores).sum()

  with jax.enable_x64(True):
    policies = TYPICAL + level + jnp.asarray(margins)[:, None] * moves
    both = jax.jit(jax.vmap(jax.value_and_grad(total)))
    values, slopes = map(np.asarray, both(policies))
  return values / B, 0.0 - slopes


def curves(name, margins):
  """Returns what a picture shows: {'loss' or 'weight': {label: [M]}}.

  A weight is positive where it raises what is good or lowers what is bad.
  """
  form = table.get(name).forms[0]
  values, weights = trace(name, margins, p=SOFT.get(name, 1.0))
  if form == 'pairs':
    both = {'chosen': weights[:, 0], 'rejected': 0.0 - weights[:, 1]}
    return {'loss': {'': values}, 'weight': both}
  if form == 'sft':
    return {'loss': {'': values}, 'weight': {'': weights[:, 0]}}
  bad, bad_weights = trace(name, margins, p=0.0)
  return {
    'loss': {'p = 1': values, 'p = 0': bad},
    'weight': {'p = 1': weights[:, 0], 'p = 0': 0.0 - bad_weights[:, 0]},
  }


def samples():
  """Returns the curves of all losses at a few margins, with four digits."""
  margins = MARGINS[::30]

  def rounded(values):
    return [float(f'{x:.4g}') for x in values]

  return {'margin': rounded(margins)} | {
    name: {
      panel: {label: rounded(values) for label, values in lines.items()}
      for panel, lines in curves(name, margins).items()
    }
    for name in table.LOSSES
  }


def differing(stored, computed):
  """Returns the losses whose samples are in one of them only, or have moved."""
  names = [*stored, *(name for name in computed if name not in stored)]
  return [x for x in names if not _same(stored.get(x), computed.get(x))]


def _same(one, other):
  if isinstance(one, dict) and isinstance(other, dict):
    return set(one) == set(other) and all(_same(one[k], other[k]) for k in one)
  if not (isinstance(one, list) and isinstance(other, list)):
    return False
  # Weights that vanish differ by platform.
  smallest = 1e-6 * np.abs(other).max()
  return len(one) == len(other) and np.allclose(
    one, other, rtol=1e-3, atol=smallest
  )


# --- Pictures ---

SVG = {
  'svg.hashsalt': 'dpo_jax',  # the same bytes every time
  'svg.fonttype': 'none',  # text stays text
  'font.sans-serif': ['DejaVu Sans', 'Verdana', 'Arial'],
  'path.simplify_threshold': 0.5,  # pixels; saves half the bytes
}
STYLES = (  # of a panel's lines; the second one shows where it hides the first
  {'color': '#2f6db3', 'linewidth': 2.2},
  {'color': '#d9822b', 'linewidth': 1.6, 'linestyle': (0, (3, 2))},
)


def _panels(height, xlabel, title):
  """Returns a figure with two axes, of loss and of gradient weight."""
  figure = matplotlib.figure.Figure(figsize=(7.0, height), layout='constrained')
  figure.suptitle(title, fontsize=9, x=0.01, ha='left')
  axes = figure.subplots(1, 2)
  for axis, panel in zip(axes, ('loss', 'gradient weight')):
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(color='0.92')
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(panel, fontsize=8)
  return figure, axes


def _save(figure, path):
  figure.savefig(path, metadata={'Date': None, 'Creator': None})


@matplotlib.rc_context(SVG)
def draw(name, title, path):
  """Draws loss and gradient weight of a loss against margin."""
  loss, x = table.get(name), MARGINS
  if loss.forms[0] == 'pairs':
    xlabel = 'h' if loss.reference else 'log π(yw) − log π(yl)'
    if loss.head:
      xlabel = 'r(yw) − r(yl)'
  elif loss.reference:
    xlabel = 'ρ'
  else:
    xlabel, x = 'log π(y)', TYPICAL + MARGINS
  figure, axes = _panels(2.3, xlabel, title)
  for axis, lines in zip(axes, curves(name, MARGINS).values()):
    for (label, values), style in zip(lines.items(), STYLES):
      axis.plot(x, values, label=label, **style)
    if len(lines) > 1:
      axis.legend(fontsize=8, frameon=False)
    axis.set_xticks(x[::60])
    axis.locator_params('y', nbins=5)
    axis.margins(y=0.1)
  axes[1].axhline(0.0, color='0.7', linewidth=1.0, zorder=0)
  _save(figure, path)


def alike():
  """Groups the losses of the margin alone by their curves, at one beta.

  Returns:
    {names: (loss [M], weight [M])}, scaled to loss 0 and weight 1 or -1 at
    margin 0.
  """
  zero, out = len(MARGINS) // 2, {}
  for name, loss in table.LOSSES.items():
    usual = loss.forms[0], loss.reductions[0]
    if usual != ('pairs', 'sum') or loss.batchwise:
      continue
    how = {'p': SOFT.get(name, 1.0)}
    if 'beta' in table.options(name):
      how['beta'] = 0.1
    values, weights = trace(name, MARGINS, **how)
    if not np.allclose(values, trace(name, MARGINS, level=-20.0, **how)[0]):
      continue  # not of the margin alone
    scale = abs(weights[zero, 0])
    curve = (values - values[zero]) / scale, weights[:, 0] / scale
    same = next((k for k in out if np.allclose(out[k], curve)), ())
    out.pop(same, None)
    out[(*same, name)] = curve
  return out


@matplotlib.rc_context(SVG)
def draw_overview(path):
  """Draws all losses of the margin alone over each other."""
  title = 'beta 0.1; scaled to a gradient weight of 1 or −1 at h = 0'
  figure, axes = _panels(4.0, 'h', title)
  groups, colors = alike(), matplotlib.colormaps['tab10'].colors
  for number, (names, both) in enumerate(groups.items()):
    for axis, values in zip(axes, both):
      color = colors[number % len(colors)]
      axis.plot(MARGINS, values, label=', '.join(names), color=color)
  axes[0].set_ylim(-25.0, 75.0)
  axes[1].set_ylim(-2.0, 3.0)
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc='outside lower left',
    ncols=4,
    fontsize=8,
    frameon=False,
  )
  _save(figure, path)
