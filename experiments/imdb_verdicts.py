"""Gates of the studies of `imdb_variants`: criteria that can fail.

  A11  bakeoff: the best run of every method has more reward than the SFT model
       by three standard errors, and none stopped at a number that is not
       finite; f-DPO with forward KL ends with more entropy than DPO; TDPO2 has
       less forward KL on rejected responses than DPO at equal reward; TR-DPO
       (alpha 0.6) has at least DPO's reward
  A12  displacement: log pi(y_w) on held-out pairs falls under DPO and APO-down,
       changes by more than under DPO with NCA, APO-zero, RPO, ORPO and CPO, and
       does not fall with NCA and APO-zero at a small learning rate. Void where
       DPO does not rank held-out pairs better than by chance
  A13  length: under labels that like length DPO's responses grow by 20 % or
       more; those of R-DPO, LD-DPO, SimPO and length-normalized DPO stay within
       10 % of the SFT model's, with 90 % of DPO's reward or more, and with a
       higher length-controlled win rate. Void where DPO's reward does not rise

"More by three standard errors" is 0.1 % by chance of one run; A11 takes the
best of four, on the prompts that it tells, of each of 22 methods. Differences
are of the same prompts. A gate that lacks a run that it compares is void too;
A11 is incomplete until all runs are finished. Whatever comes out is reported as
it is.
"""

import dataclasses
import math

import numpy as np
import scipy.optimize
import scipy.special

from dpo_jax import judges
from experiments import imdb_gates

SURE = 3.0  # standard errors
GROWS, STAYS, SHARE = 0.2, 0.1, 0.9  # of A13
RIDGE = 1e-4  # of length-controlled win rates, so that they are finite


@dataclasses.dataclass(frozen=True)
class Variant:
  """A run. values: method, lr, strength, texts. status: of `sweep_results`, or
  'diverged'. records: [(step, {name: number})]; samples: {step: {prompt: row}}.
  changes: of `imdb_changes`.
  """

  values: dict
  status: str
  records: list
  samples: dict
  changes: np.ndarray | None = None

  @property
  def method(self):
    return self.values['method']

  def column(self, name, *, last=True):
    """Returns what was measured on each prompt, at the end or before, [N]."""
    rows = self.samples[(max if last else min)(self.samples)]
    return np.array([rows[prompt][name] for prompt in sorted(rows)])

  def number(self, name, *, last=True):
    """Returns a number of the log, at its last place or its first."""
    found = [x[name] for _, x in self.records if name in x]
    return (found[-1] if last else found[0]) if found else math.nan


def finished(variants):
  """Returns those that are finished."""
  return [v for v in variants if v.status == 'finished']


def mean_and_error(values):
  """Returns (mean, standard error) of one number a prompt."""
  return float(np.mean(values)), judges.standard_error(values)


def told(pair, digits=3):
  """Writes a mean and its error."""
  mean, error = pair
  return f'{mean:+.{digits}f} ± {error:.{digits}f}'


def _rate(pair):
  """Writes a share and its error."""
  return f'{pair[0]:.3f} ± {pair[1]:.3f}'


def _gate(parts, text, *, void='', complete=True):
  """Returns what a gate says.

  Args:
    parts: {what is asked: whether it holds}.
    text: the numbers.
    void: why they are no answer, or ''.
    complete: see `imdb_gates.gate`.
  """
  failed = [name for name, holds in parts.items() if not holds]
  why = void or (f'fails: {", ".join(failed)}' if failed else '')
  text = '; '.join(filter(None, [why, text]))
  return imdb_gates.gate(parts, text, void=bool(void), complete=complete)


# --- A12 ----------------------------------------------------------------------

_ABOVE_DPO = ('nca', 'apo_zero', 'rpo', 'orpo', 'cpo')
_FALLING = ('dpo', 'apo_down')
_SLOW = ('nca', 'apo_zero')


def gate_a12(changes, slow, *, accuracy):
  """Asks what becomes of log pi(y_w).

  Args:
    changes: {method: change on each held-out prompt, nats, [N]}.
    slow: the same at a small learning rate.
    accuracy: (share of held-out pairs that DPO ranks rightly, its error).
  """
  missing = [m for m in (*_FALLING, *_ABOVE_DPO) if m not in changes]
  missing += [f'{m} at a small learning rate' for m in _SLOW if m not in slow]
  if missing:
    return _gate({}, '', void=f'there is no run of {", ".join(missing)}')
  means = {m: mean_and_error(x) for m, x in changes.items()}
  small = {m: mean_and_error(slow[m]) for m in _SLOW}
  over = {m: mean_and_error(changes[m] - changes['dpo']) for m in _ABOVE_DPO}
  parts = {f'{m} < 0': means[m][0] < 0.0 for m in _FALLING}
  parts |= {f'{m} > dpo': over[m][0] > 0.0 for m in _ABOVE_DPO}
  parts |= {f'{m} >= 0 slowly': small[m][0] >= 0.0 for m in _SLOW}
  void = ''
  if not accuracy[0] > 0.5 + SURE * accuracy[1]:
    void = 'DPO ranks held-out pairs by chance'
  text = 'nats: ' + ', '.join(f'{m} {told(x, 2)}' for m, x in means.items())
  text += '; over DPO: '
  text += ', '.join(f'{m} {told(x, 2)}' for m, x in over.items())
  text += '; at a small learning rate: '
  text += ', '.join(f'{m} {told(x, 2)}' for m, x in small.items())
  text += f'; accuracy of DPO {accuracy[0]:.3f} ± {accuracy[1]:.3f}'
  return _gate(parts, text, void=void)


# --- A13 ----------------------------------------------------------------------


def growth(now, before):
  """Returns (mean(now) / mean(before) - 1, its standard error) of prompts."""
  ratio = np.mean(now) / np.mean(before)
  error = judges.standard_error(now - ratio * before) / np.mean(before)
  return float(ratio - 1.0), float(error)


def controlled_win_rate(wins, longer):
  """Returns the win rate that would be at equal lengths, and what prompts do.

  AlpacaEval 2's logistic regression (arXiv:2404.04475), P(win) = sigmoid(theta
  + phi tanh(d / std d)) with d the difference in length, at d = 0: sigmoid(
  theta). Simplified: no difficulty of the instruction; a ridge of 1e-4 on both
  numbers in the place of a cross-validated L1.

  Args:
    wins: 1, 0, or 1/2 for a tie, [N].
    longer: tokens, [N].

  Returns:
    (rate, influences [N]): the standard error of an influence's mean is that of
    the rate (M-estimation; the spread of d is taken as known).
  """
  spread = np.std(longer)
  gap = np.tanh(longer / spread) if spread else np.zeros(len(longer))
  inputs = np.stack([np.ones(len(wins)), gap], axis=1)

  def loss(weights):
    z = inputs @ weights
    nll = np.logaddexp(0.0, z) - wins * z
    slope = inputs.T @ (scipy.special.expit(z) - wins) / len(wins)
    ridge = RIDGE * weights
    return nll.mean() + 0.5 * ridge @ weights, slope + ridge

  best = scipy.optimize.minimize(loss, np.zeros(2), jac=True, method='BFGS')
  chances = scipy.special.expit(inputs @ best.x)
  curvature = RIDGE * np.eye(2) + inputs.T @ (
    inputs * (chances * (1.0 - chances))[:, None] / len(wins)
  )
  moves = np.linalg.solve(curvature, (inputs * (wins - chances)[:, None]).T)
  rate = float(scipy.special.expit(best.x[0]))
  return rate, rate * (1.0 - rate) * moves[0]


def against(variant, baseline, bonus):
  """Returns (wins, tokens that it is longer by) over a baseline, by prompt.

  The one with the higher P(positive) + bonus x tokens wins: who made the labels
  is the judge.

  Args:
    variant: a `Variant`.
    baseline: {prompt: {'reward', 'length'}}.
    bonus: for a token.
  """
  rows = variant.samples[max(variant.samples)]
  lead, longer = [], []
  for prompt in sorted(rows):
    row, other = rows[prompt], baseline[prompt]
    gap = row['length'] - other['length']
    longer.append(gap)
    lead.append(row['reward'] - other['reward'] + bonus * gap)
  return (np.sign(lead) + 1.0) / 2.0, np.array(longer, float)


_ENDURING = ('r_dpo', 'ld_dpo', 'simpo', 'dpo_norm')


def gate_a13(runs, baseline, bonus):
  """Asks whose responses grow, at which reward.

  Args:
    runs: {method: `Variant`}, finished.
    baseline: {prompt: {'reward', 'length'}} of the short SFT model.
    bonus: of a token in the labels.
  """
  missing = [m for m in ('dpo', *_ENDURING) if m not in runs]
  lines, numbers, rates = [], {}, {}
  for method in sorted(runs, key=['dpo', *_ENDURING].index):
    variant = runs[method]
    length, reward = variant.column('length'), variant.column('reward')
    wins, longer = against(variant, baseline, bonus)
    rates[method] = controlled_win_rate(wins, longer)
    rate, influences = rates[method]
    found = {
      'growth': growth(length, variant.column('length', last=False)),
      'rise': mean_and_error(reward - variant.column('reward', last=False)),
      'controlled': (rate, judges.standard_error(influences)),
      'raw': mean_and_error(wins),
    }
    text = (
      f'{method}: length {100 * found["growth"][0]:+.1f} ±'
      f' {100 * found["growth"][1]:.1f} %, reward {told(found["rise"])}'
      f' over SFT, win rate {_rate(found["raw"])}, length-controlled'
      f' {_rate(found["controlled"])}'
    )
    if method != 'dpo' and 'dpo' in runs:
      theirs = runs['dpo'].column('reward')
      found['share'] = growth(reward, theirs)
      found['lead'] = (
        rate - rates['dpo'][0],
        judges.standard_error(influences - rates['dpo'][1]),
      )
      text += (
        f' ({told(found["lead"])} over DPO),'
        f' {100 + 100 * found["share"][0]:.1f} ± {100 * found["share"][1]:.1f}'
        " % of DPO's reward"
      )
    numbers[method] = found
    lines.append(text)
  if missing:
    void = f'there is no run of {", ".join(missing)}'
    return _gate({}, '; '.join(lines), void=void)
  parts = {'dpo grows': numbers['dpo']['growth'][0] >= GROWS}
  for method in _ENDURING:
    found = numbers[method]
    parts[f'{method} keeps its length'] = abs(found['growth'][0]) <= STAYS
    parts[f'{method} has the reward'] = 1.0 + found['share'][0] >= SHARE
    parts[f'{method} wins'] = found['lead'][0] > 0.0
  mean, error = numbers['dpo']['rise']
  void = '' if mean > SURE * error else "DPO's reward does not rise"
  return _gate(parts, '; '.join(lines), void=void)


# --- A11 ----------------------------------------------------------------------


def rise(variant):
  """Returns (reward over the SFT model's, its error), of the same prompts."""
  before = variant.column('reward', last=False)
  return mean_and_error(variant.column('reward') - before)


def matched(variants, one, other, column):
  """Returns (mean difference, its error) of two methods, at equal settings.

  One number a prompt: the mean over the learning rates and strengths that both
  have. None where there are none.
  """
  runs = {}
  for v in finished(variants):
    runs.setdefault((v.values['lr'], v.values['strength']), {})[v.method] = v
  both = [x for x in runs.values() if one in x and other in x]
  if not both:
    return None
  gaps = [x[one].column(column) - x[other].column(column) for x in both]
  return mean_and_error(np.mean(gaps, axis=0))


def at_equal_reward(variants, one, other, name):
  """Returns the mean of log's `name` of `one` less that of `other`, where both
  have the same reward; None where they never have.

  All measurements of `other`, in the order of reward, with lines between; the
  last ones of `one` within them.
  """
  theirs = sorted(
    (found['samples/reward'], found[name])
    for v in finished(variants)
    if v.method == other
    for _, found in v.records
    if name in found and 'samples/reward' in found
  )
  ours = [
    (v.number('samples/reward'), v.number(name))
    for v in finished(variants)
    if v.method == one
  ]
  if not theirs:
    return None
  rewards, values = zip(*theirs)
  gaps = [
    value - np.interp(reward, rewards, values)
    for reward, value in ours
    if rewards[0] <= reward <= rewards[-1]
  ]
  return float(np.mean(gaps)) if gaps else None


def gate_a11(variants, expected):
  """Asks whether every method learns, and three differences between them.

  Args:
    variants: all runs.
    expected: [(method, lr, strength)] of all runs that there should be.
  """
  parts, said, missing = {}, [], []
  whole = {key(*run) for run in expected}
  there = {
    key(*(v.values[name] for name in ('method', 'lr', 'strength')))
    for v in variants
    if v.status in ('finished', 'diverged')
  }
  for method in dict.fromkeys(run[0] for run in expected):
    own = [v for v in variants if v.method == method]
    done = finished(own)
    if not done:
      missing.append(method)
      continue
    best = max(done, key=lambda v: v.number('samples/reward'))
    mean, error = rise(best)
    learns = mean > SURE * error
    if learns or not {run for run in whole - there if run[0] == method}:
      parts[f'{method} learns'] = learns
    parts[f'{method} is finite'] = all(v.status != 'diverged' for v in own)
    said.append(f'{method} {told((mean, error))}')
  text = 'reward over SFT, of the best run: ' + ', '.join(said) if said else ''
  for title, one, other, column, least in [
    ('entropy of f_dpo over dpo', 'f_dpo', 'dpo', 'entropy', 0.0),
    ('reward of tr_dpo over dpo', 'tr_dpo', 'dpo', 'reward', -1e-12),
  ]:
    found = matched(variants, one, other, column)
    if found is None:
      missing.append(title)
    else:
      parts[title] = found[0] > least
      text += f'; {title} {told(found)}'
  title = 'forward KL of tdpo2 on rejected over dpo at equal reward'
  gap = at_equal_reward(variants, 'tdpo2', 'dpo_kls', 'heldout/kl/rejected')
  if gap is None:
    missing.append(title)
  else:
    parts[title] = gap < 0.0
    text += f'; {title} {gap:+.3f} nats'
  void = f'there is nothing of {", ".join(missing)}' if missing else ''
  text += f'; {len(there & whole)} of {len(whole)} runs'
  return _gate(parts, text, void=void, complete=whole <= there)


def key(method, lr, strength):
  """Returns what tells runs of the bake-off apart."""
  return method, float(lr), float(strength)
