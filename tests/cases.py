"""Losses worked out by hand: inputs, options, and the numbers they must give.

`GOLDEN` are numbers computed once outside this package, most of them checked
against TRL's loss block; `FORMULAS` evaluates here, in numpy and float64, each
paper's equation for what the first has no numbers for.
"""

import functools
import inspect
import types
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import choices
from dpo_jax.losses import scoring
from dpo_jax.losses import table

# Three pairs, chosen first: sums of log-probs, and numbers of tokens.
POLICY = np.array([[-12.0, -15.0], [-20.0, -18.0], [-30.0, -45.0]])
REF = np.array([[-13.0, -14.5], [-19.0, -18.5], [-40.0, -35.0]])
LENGTHS = np.array([[6.0, 8.0], [10.0, 9.0], [12.0, 20.0]])
# Two rankings of three.
POLICY_3 = np.array([[-10.0, -12.0, -11.0], [-7.0, -6.5, -8.0]])
REF_3 = np.array([[-11.0, -11.5, -10.25], [-7.5, -6.0, -8.25]])
REWARDS_3 = np.array([[1.0, 0.5, -0.25], [0.75, 0.5, 0.0]])


class Case(NamedTuple):
  name: str
  options: dict
  expected: Any
  fields: Any = types.MappingProxyType({})  # of Scores, besides the three pairs

  def __str__(self):
    parts = [f'{k}={v}' for k, v in self.options.items()] + list(self.fields)
    return ' '.join([self.name, *parts])


def reduction(case):
  return table.options(case.name, **case.options)['reduction']


def scores(case):
  """Returns the case's Scores, reduced as it says."""
  values = {'policy': POLICY, 'ref': REF, 'lengths': LENGTHS} | case.fields
  if reduction(case) == 'mean':
    for field in ('policy', 'ref'):
      values[field] = values[field] / values['lengths']
  return scoring.Scores(
    **{k: v if k == 'memory' else jnp.asarray(v) for k, v in values.items()}
  )


def ranking(**fields):
  return {
    'policy': POLICY_3,
    'ref': REF_3,
    'lengths': np.ones((2, 3)),
    'rewards': REWARDS_3,
  } | fields


def with_ratios(own, other, p):
  """Single responses with these log-ratios, and their mismatched partners'."""
  rho = np.stack([own, np.broadcast_to(other, np.shape(own))], axis=-1)
  return {'policy': REF + rho, 'p': np.broadcast_to(p, np.shape(own))}


RHO = POLICY - REF
W, L = RHO[:, 0], RHO[:, 1]
H = W - L

GOLDEN = [
  Case('dpo', {'beta': 0.1}, [0.620957, 0.770957, 0.126928]),
  Case('dpo', {'link': 'forward_kl'}, [0.631154, 0.804299, 0.0]),
  Case('dpo', {'link': 'js'}, [0.660652, 0.735986, 0.313262]),
  Case('dpo', {'link': 'alpha:0.5'}, [0.627691, 0.783918, 1.3e-13]),
  Case('cdpo', {'label_smoothing': 0.1}, [0.635957, 0.755957, 0.326928]),
  Case('robust', {'label_smoothing': 0.1}, [0.602207, 0.789707, -0.123072]),
  Case('soft', {}, [0.650957, 0.740957, 0.526928], {'p': np.full(3, 0.8)}),
  Case('dr_dpo', {'beta_prime': 1.0}, [0.466917] * 3),
  Case('ipo_sum', {'beta': 0.1}, [12.25, 42.25, 225.0]),
  Case('ipo_mean', {'beta': 0.1}, [22.7609, 26.5798, 13.4444]),
  Case('hinge', {'beta': 0.1}, [0.85, 1.15, 0.0]),
  Case('slic', {'delta': 1.0, 'nll_weight': 0.0}, [0.0, 3.0, 0.0]),
  Case('dpo_norm', {'beta': 5.0}, [0.276084, 1.155820, 0.00127182]),
  Case('exo', {'label_smoothing': 1e-3}, [2.50552, 3.02255, 0.458972]),
  Case('infonca', {'beta': 0.1}, [0.620957, 0.770957, 0.126928]),
  Case('nca', {'beta': 0.1}, [1.35082, 1.42582, 1.12652]),
  Case('bco', {'beta': 0.1, 'shift': 'none'}, [1.31286, 1.46286, 0.626523]),
  Case('sppo', {'eta': 10.0}, [36.25, 66.25, 50.0]),
  Case('apo_zero', {}, [0.962523, 1.03748, 0.537883]),
  Case('apo_down', {}, [0.987549, 1.01245, 0.850262]),
  Case('discopop', {'beta': 0.1, 'tau': 0.05}, [0.849338, 0.789495, 0.135335]),
  # A pair has the loss of its own a or c: those were worked out in the order
  # of a, (-2, 3, 15), and of c, (-1, 1, 10).
  Case('aot', {'beta': 0.1}, [0.533382, 0.554355, 0.230509]),
  Case('aot_unpaired', {'beta': 0.1}, [0.620957, 0.341154, 0.326956]),
  Case('kto', {}, [0.482507, 0.532454, 0.274881], with_ratios(W, 0.3, 1.0)),
  Case('kto', {}, [0.480011, 0.505000, 0.263084], with_ratios(L, 0.3, 0.0)),
  Case('simpo', {'beta': 2.0, 'gamma': 1.0}, [1.50193, 1.31326, 1.70141]),
  Case('orpo', {'alpha': 0.1}, [2.07688, 2.06931, 2.58405]),
  Case('cpo', {'alpha': 0.0}, [0.554355, 0.798139, 0.201413]),
  Case('r_dpo', {'alpha': 0.01}, [0.630258, 0.765595, 0.136807]),
  Case(
    'rpo',
    {'beta': 0.1, 'eta': 1.0, 'nll': 'mean'},
    [2.62096, 2.77096, 2.62693],
  ),
  Case(
    'plackett_luce',
    {'beta': 1.0},
    [0.917481],
    {'policy': np.array([[1.0, 0.2, -0.5]]), 'ref': np.zeros((1, 3))},
  ),
  Case(
    'plackett_luce',
    {'beta': 1.0},
    [0.371101],
    {'policy': np.array([[1.0, 0.2]]), 'ref': np.zeros((1, 2))},
  ),
]

# --- The papers' equations in numpy ---


def nll(z):
  """-log sigmoid(z)."""
  return np.logaddexp(0.0, -z)


def sigmoid(z):
  return np.exp(-nll(z))


def softmax(x):
  e = np.exp(x)
  return e / e.sum(-1, keepdims=True)


def mean_of(logps):
  return logps / LENGTHS


KLS = np.array([[1.0, 2.0], [0.5, 1.5], [4.0, 3.0]])
D_W, D_L = KLS[:, 0], KLS[:, 1]
COMPLEMENTS = np.array([[-3.0, -2.0], [-1.0, -2.0], [-4.0, -0.5]])
COSTS = np.array([[0.0, 1.0], [0.7, 0.2], [0.5, 0.9]])
P = np.array([0.9, 0.6, 0.2])
CONFIDENCES = np.array([[-1.0, 0.5], [0.25, 0.5], [-0.5, -2.0]])
REWARD_3 = 0.1 * (POLICY_3 - REF_3)
TARGET_3 = softmax(REWARDS_3 / 0.5)


def exo(target, e):
  """Reverse KL of softmax(REWARD_3) to a smoothed target."""
  target = (1 - e) * target + e * (1 - target) / 2
  q = softmax(REWARD_3)
  return np.sum(q * np.log(q / target), -1)


def log_odds(mean_logps):
  return mean_logps - np.log(1 - np.exp(mean_logps))


GIVEN = np.array([[1.0, 0.25], [0.5, 0.0], [-1.0, -1.5]])  # rewards of pairs

MEANS = mean_of(POLICY)
ODDS = log_odds(MEANS)

FORMULAS = [
  Case(
    'dpop',
    {'penalty': 50.0},
    nll(0.1 * (H - 50.0 * np.maximum(0.0, REF[:, 0] - POLICY[:, 0]))),
  ),
  Case('tdpo1', {}, nll(0.1 * (H - (D_L - D_W))), {'kls': KLS}),
  Case('tdpo2', {}, nll(0.1 * (H - 0.5 * (D_L - D_W))), {'kls': KLS}),
  Case(
    'plackett_luce',
    {},
    nll(REWARD_3[:, 0] - np.log(np.exp(REWARD_3[:, 1:]).sum(-1)))
    + nll(REWARD_3[:, 1] - REWARD_3[:, 2]),
    ranking(),
  ),
  Case(
    'plackett_luce',
    {'top': 1},
    nll(REWARD_3[:, 0] - np.log(np.exp(REWARD_3[:, 1:]).sum(-1))),
    ranking(),
  ),
  Case(
    'infonca',
    {'beta': 0.1, 'reward_temperature': 0.5},
    -np.sum(TARGET_3 * np.log(softmax(REWARD_3)), -1),
    ranking(),
  ),
  Case(
    'infonca',
    {'beta': 0.1},
    P * nll(0.1 * H) + (1 - P) * nll(-0.1 * H),
    {'p': P},
  ),
  Case(
    'exo',
    {'reward_temperature': 0.5, 'label_smoothing': 0.0},
    exo(TARGET_3, 0.0),
    ranking(),
  ),
  Case(
    'exo',
    {'reward_temperature': 0.5, 'label_smoothing': 0.1},
    exo(TARGET_3, 0.1),
    ranking(),
  ),
  Case('exo', {'label_smoothing': 0.1}, exo(np.eye(3)[[0, 0]], 0.1), ranking()),
  Case(
    'nca',
    {'beta': 0.1, 'reward_temperature': 0.5},
    np.sum(TARGET_3 * nll(REWARD_3), -1) + nll(-REWARD_3).mean(-1),
    ranking(),
  ),
  # The running mean of (W, L), alone and after 4 rewards with mean 0.5.
  Case(
    'bco',
    {'beta': 0.1},
    nll(0.1 * (W - RHO.mean())) + nll(-0.1 * (L - RHO.mean())),
  ),
  Case(
    'bco',
    {'beta': 0.1},
    nll(0.1 * W - (0.1 * RHO.sum() + 2.0) / 10)
    + nll((0.1 * RHO.sum() + 2.0) / 10 - 0.1 * L),
    {'memory': {'mean': 0.5, 'count': 4.0}},
  ),
  # The same of single responses.
  Case(
    'bco',
    {'beta': 0.1},
    P * nll(0.1 * (W - W.mean())) + (1 - P) * nll(-0.1 * (W - W.mean())),
    {
      'policy': POLICY[:, :1],
      'ref': REF[:, :1],
      'lengths': LENGTHS[:, :1],
      'p': P,
    },
  ),
  Case(
    'sppo',
    {'eta': 10.0},
    (W - 10 * (P - 0.5)) ** 2 + (L - 10 * (0.5 - P)) ** 2,
    {'p': P},
  ),
  Case(
    'apo_zero_unpaired',
    {},
    P * (1 - sigmoid(0.1 * W)) + (1 - P) * sigmoid(0.1 * W),
    {'p': P},
  ),
  Case(
    'kto',
    {'desirable_weight': 1.5, 'undesirable_weight': 0.5},
    # The mismatched mean is -19/6, so that z is 0.
    1.5 * P * (1 - sigmoid(0.1 * W)) + 0.5 * (1 - P) * (1 - sigmoid(-0.1 * W)),
    {'p': P},
  ),
  Case(
    'dr_dpo',
    {'beta_prime': 2.0},
    [-2 * np.log(np.exp(-nll(0.1 * H) / 2).mean())] * 3,
  ),
  # Sorted a against sorted b gives (3, 3.5, 13.5), in the order of a.
  Case(
    'aot',
    {'beta': 0.1, 'label_smoothing': 0.2},
    0.8 * nll(np.array([0.35, 0.3, 1.35]))
    + 0.2 * nll(-np.array([0.35, 0.3, 1.35])),
  ),
  # Sorted c against sorted r gives (9, 1.5, 9.5), in the order of c.
  Case(
    'aot_unpaired',
    {'beta': 0.1, 'label_smoothing': 0.2},
    0.8 * nll(np.array([0.15, 0.9, 0.95]))
    + 0.2 * nll(-np.array([0.15, 0.9, 0.95])),
  ),
  Case('sft', {}, [12.0, 20.0, 30.0]),
  Case('sft', {'reduction': 'mean'}, [2.0, 2.0, 2.5]),
  Case('unlikelihood', {'alpha': 0.5}, [4.5, 11.0, 7.5]),
  Case(
    'token_unlikelihood',
    {'alpha': 0.5},
    -POLICY[:, 0] - 0.5 * COMPLEMENTS[:, 1],
    {'complements': COMPLEMENTS},
  ),
  Case(
    'slic',
    {'delta': 4.0, 'nll_weight': 0.1},
    np.maximum(0.0, 4.0 - POLICY[:, 0] + POLICY[:, 1]) - 0.1 * POLICY[:, 0],
  ),
  Case(
    'orpo', {'alpha': 0.5}, -MEANS[:, 0] + 0.5 * nll(ODDS[:, 0] - ODDS[:, 1])
  ),
  Case(
    'cpo',
    {'alpha': 0.5},
    nll(0.1 * (POLICY[:, 0] - POLICY[:, 1])) - 0.5 * MEANS[:, 0],
  ),
  Case(
    'cpo',
    {'alpha': 0.5, 'nll': 'sum'},
    nll(0.1 * (POLICY[:, 0] - POLICY[:, 1])) - 0.5 * POLICY[:, 0],
  ),
  Case('rpo', {}, nll(0.01 * H) - 0.005 * POLICY[:, 0]),
  Case(
    'robust',
    {'label_smoothing': 0.3},
    (0.7 * nll(0.1 * H) - 0.3 * nll(-0.1 * H)) / 0.4,
  ),
  Case(
    'likelihood_penalty',
    {},
    np.mean(np.maximum(0.0, COSTS - 0.5) * np.exp(MEANS), -1),
    {'costs': COSTS},
  ),
  # Of a reward model's scores.
  Case('bradley_terry', {}, nll(POLICY[:, 0] - POLICY[:, 1])),
  Case(
    'bradley_terry',
    {'margin_scale': 2.0, 'centering': 0.01, 'label_smoothing': 0.2},
    0.8 * nll(POLICY[:, 0] - POLICY[:, 1] - 2.0 * (GIVEN[:, 0] - GIVEN[:, 1]))
    + 0.2 * nll(2.0 * (GIVEN[:, 0] - GIVEN[:, 1]) - POLICY[:, 0] + POLICY[:, 1])
    + 0.01 * (POLICY[:, 0] + POLICY[:, 1]) ** 2,
    {'rewards': GIVEN},
  ),
  Case(
    'bradley_terry',
    {'labels': 'soft'},
    P * nll(POLICY[:, 0] - POLICY[:, 1])
    + (1 - P) * nll(POLICY[:, 1] - POLICY[:, 0]),
    {'p': P},
  ),
  Case(
    'bradley_terry',
    {'margin_scale': 1.0, 'centering': 0.1},
    np.mean(
      [
        nll(POLICY_3[:, i] - POLICY_3[:, j] - REWARDS_3[:, i] + REWARDS_3[:, j])
        + 0.1 * (POLICY_3[:, i] + POLICY_3[:, j]) ** 2
        for i, j in [(0, 1), (0, 2), (1, 2)]
      ],
      0,
    ),
    ranking(),
  ),
  Case(
    'reward_plackett_luce',
    {'centering': 0.1},
    -np.log(softmax(POLICY_3)[:, 0])
    - np.log(softmax(POLICY_3[:, 1:])[:, 0])
    + 0.1
    * np.mean(
      [
        (POLICY_3[:, i] + POLICY_3[:, j]) ** 2
        for i, j in [(0, 1), (0, 2), (1, 2)]
      ],
      0,
    ),
    ranking(),
  ),
  Case(
    'reward_plackett_luce',
    {'top': 1},
    -np.log(softmax(POLICY_3)[:, 0]),
    ranking(),
  ),
  # Choices around a loss.
  Case(
    'hinge',
    {'labels': 'soft', 'beta': 0.1},
    P * np.maximum(0.0, 1 - 0.1 * H) + (1 - P) * np.maximum(0.0, 1 + 0.1 * H),
    {'p': P},
  ),
  Case(
    'r_dpo',
    {'labels': 'soft', 'alpha': 0.1},
    P * nll(0.1 * H + 0.1 * (LENGTHS[:, 0] - LENGTHS[:, 1]))
    + (1 - P) * nll(-0.1 * H - 0.1 * (LENGTHS[:, 0] - LENGTHS[:, 1])),
    {'p': P},
  ),
  Case(
    'tdpo1',
    {'labels': 'soft'},
    P * nll(0.1 * (H - D_L + D_W)) + (1 - P) * nll(-0.1 * (H - D_L + D_W)),
    {'p': P, 'kls': KLS},
  ),
  Case(
    'dpo',
    {'weighting': 'wpo'},
    np.exp(CONFIDENCES.sum(-1)) * nll(0.1 * H),
    {'confidences': CONFIDENCES},
  ),
  Case(
    'dpo',
    {'weighting': 'wpo_clamped'},
    np.array([np.exp(-0.5), 1.0, np.exp(-2.5)]) * nll(0.1 * H),
    {'confidences': CONFIDENCES},
  ),
]
# Every other loss that takes a link, under each of them.
FORMULAS += [
  Case(name, {'link': link} | options, law(score[:, 0] - score[:, 1]))
  for link, score in [
    ('forward_kl', 1 - np.exp(-RHO)),
    ('js', np.log(2 / (1 + np.exp(-RHO)))),
    ('alpha:0.25', (1 - np.exp(-0.25 * RHO)) / 0.25),
  ]
  for name, options, law in [
    ('cdpo', {}, lambda d: 0.9 * nll(0.1 * d) + 0.1 * nll(-0.1 * d)),
    ('soft', {}, lambda d: nll(0.1 * d)),
    (
      'robust',
      {},
      lambda d: (0.9 * nll(0.1 * d) - 0.1 * nll(-0.1 * d)) / 0.8,
    ),
    ('ipo_sum', {}, lambda d: (d - 5.0) ** 2),
    ('hinge', {}, lambda d: np.maximum(0.0, 1 - 0.05 * d)),
    (
      'discopop',
      {'tau': 0.5},
      lambda d: (
        sigmoid(-0.1 * d) * nll(0.05 * d) + np.exp(-nll(0.1 * d) - 0.05 * d)
      ),
    ),
    (
      'r_dpo',
      {},
      lambda d: nll(0.1 * d + 0.01 * (LENGTHS[:, 0] - LENGTHS[:, 1])),
    ),
    ('plackett_luce', {}, lambda d: nll(0.1 * d)),
    (
      'exo',
      {'label_smoothing': 0.1},
      lambda d: (
        -sigmoid(0.1 * d) * (nll(0.1 * d) + np.log(0.9))
        - sigmoid(-0.1 * d) * (nll(-0.1 * d) + np.log(0.1))
      ),
    ),
    ('dr_dpo', {}, lambda d: [-np.log(np.exp(-nll(0.1 * d)).mean())] * 3),
  ]
]

ALL = GOLDEN + FORMULAS


# --- Random scores with every field ---


def draw(seed, *, B=6, K=2, size=5.0, dtype=np.float32):
  """Returns sums of log-probs, and everything else, of B groups."""
  rng = np.random.default_rng(seed)
  ref = -rng.uniform(20.0, 60.0, (B, K))
  fields = {
    'policy': ref + size * rng.standard_normal((B, K)),
    'ref': ref,
    'lengths': rng.integers(5, 30, (B, K)),
    'p': rng.uniform(0.1, 0.9, B),
    'rewards': rng.standard_normal((B, K)),
    'costs': rng.uniform(0.0, 1.0, (B, K)),
    'kls': rng.uniform(0.0, 3.0, (B, K)),
    'complements': -rng.uniform(0.1, 3.0, (B, K)),
    'confidences': 0.5 * rng.standard_normal((B, K)),
  }
  return scoring.Scores(
    **{k: jnp.asarray(v, dtype) for k, v in fields.items()},
    mask=jnp.ones(B, bool),
    memory={'mean': jnp.asarray(0.3, dtype), 'count': jnp.asarray(4.0, dtype)},
  )


def reduced(scores, how):
  """Scores of sums as those of another reduction; 'last' is of no sum."""
  if how in ('sum', 'last'):
    return scores
  return scores._replace(
    policy=scores.policy / scores.lengths, ref=scores.ref / scores.lengths
  )


def usual(name, scores):
  """Scores of sums as the loss usually has them."""
  return reduced(scores, table.get(name).reductions[0])


# --- Values and gradients ---


def measure(name, options, scores, field='policy'):
  """Returns losses [...] and the gradient of the real ones' sum, compiled."""
  compiled = _compiled(name, tuple(options.items()), field)
  return compiled(getattr(scores, field), scores)


@functools.cache
def _compiled(name, options, field):
  function = table.make(name, **dict(options))

  @jax.jit
  def both(x, scores):
    values, pull = jax.vjp(lambda x: function(scores._replace(**{field: x})), x)
    ones = jnp.broadcast_to(scores.mask, values.shape).astype(values.dtype)
    return values, pull(ones)[0]

  return both


# --- The table's choices ---


def entries(choice_table):
  """Every entry as a config writes it, with 0.5 where it takes a number."""
  return [
    f'{name}:0.5' if 'alpha' in inspect.signature(function).parameters else name
    for name, function in choice_table.items()
  ]


def takes_soft_labels(name):
  try:
    table.make(name, labels='soft')
  except ValueError:
    return False
  return True


LINKS = entries(choices.LINKS)
# Losses that take a link, and losses that take soft labels.
LINKED = [name for name in table.LOSSES if 'link' in table.options(name)]
SOFT = [name for name in table.LOSSES if takes_soft_labels(name)]


def slopes(function, scores, field='policy'):
  """Gradient of the sum of the losses."""
  values, pull = jax.vjp(
    lambda x: function(scores._replace(**{field: x})), getattr(scores, field)
  )
  return np.asarray(pull(jnp.ones_like(values))[0])
