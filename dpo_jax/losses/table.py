"""The table of losses, and how a config's section becomes functions.

A term is a loss with its choices: weight, reduction, weighting, labels, and
the keywords of its function. Several terms are summed. `LOSSES` is the only
place where a loss has a name.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import names
from dpo_jax.losses import batchwise
from dpo_jax.losses import choices
from dpo_jax.losses import comparisons
from dpo_jax.losses import levels
from dpo_jax.losses import likelihoods
from dpo_jax.losses import margins
from dpo_jax.losses import scoring

_OF_PAIRS = ('sum', 'mean', 'ld', 'ld_mean')  # reductions


class Loss(NamedTuple):
  """A table row: the function and what it needs and supports."""

  function: Callable  # (scores, **keywords) -> [...]; its defaults are ours
  forms: tuple = ('pairs',)  # of data; the first is the usual one
  reference: bool = True  # needs reference log-probs
  preference: bool = True  # looks at which response is better
  reductions: tuple = _OF_PAIRS  # the first is the usual one
  weightings: tuple = tuple(choices.WEIGHTINGS)
  needs: tuple = ()  # optional fields of Scores that it looks at
  batchwise: bool = False  # groups cannot be weighted one by one
  mismatched: bool = False  # responses come with another prompt's
  ordered: bool = False  # rankings must have no ties
  head: bool = False  # scores responses by a head, not by their log-probs
  remember: Callable | None = None  # (scores, **keywords) -> Scores.memory


_KWISE = ('pairs', 'rankings')
_OF_HEADS = dict(
  forms=_KWISE,
  reference=False,
  reductions=('last',),
  weightings=('none',),
  ordered=True,
  head=True,
)
_EQUAL = ('none',)  # weightings

LOSSES = {
  # of the margin
  'dpo': Loss(margins.dpo),
  'cdpo': Loss(margins.cdpo),
  'soft': Loss(margins.soft, needs=('p',)),
  'robust': Loss(margins.robust),
  'dpo_norm': Loss(margins.dpo_norm, reductions=('mean', 'ld_mean')),
  'ipo_sum': Loss(margins.ipo_sum, reductions=('sum', 'ld')),
  'ipo_mean': Loss(margins.ipo_mean, reductions=('mean', 'ld_mean')),
  'hinge': Loss(margins.hinge),
  'discopop': Loss(margins.discopop),
  'r_dpo': Loss(margins.r_dpo),
  'dpop': Loss(margins.dpop, reductions=('sum', 'ld')),
  'rpo': Loss(margins.rpo, reductions=('sum',)),
  'tdpo1': Loss(margins.tdpo1, reductions=('sum',), needs=('kls',)),
  'tdpo2': Loss(margins.tdpo2, reductions=('sum',), needs=('kls',)),
  'plackett_luce': Loss(margins.plackett_luce, _KWISE, ordered=True),
  'infonca': Loss(margins.infonca, _KWISE, needs=('p', 'rewards')),
  'exo': Loss(margins.exo, _KWISE, needs=('p', 'rewards')),
  # of each response's level
  'nca': Loss(levels.nca, _KWISE, needs=('p', 'rewards')),
  'bco': Loss(
    levels.bco,
    ('pairs', 'unpaired'),
    needs=('memory',),
    remember=levels.bco_memory,
  ),
  'sppo': Loss(levels.sppo, needs=('p',)),
  'apo_zero': Loss(levels.apo_zero),
  'apo_down': Loss(levels.apo_down),
  'apo_zero_unpaired': Loss(
    levels.apo_zero_unpaired,
    ('unpaired',),
    reductions=('sum', 'mean'),
    needs=('p',),
  ),
  # of the whole batch
  'kto': Loss(
    batchwise.kto,
    ('unpaired',),
    reductions=('sum', 'mean'),
    weightings=_EQUAL,
    needs=('p',),
    mismatched=True,
  ),
  'dr_dpo': Loss(batchwise.dr_dpo, weightings=_EQUAL, batchwise=True),
  'aot': Loss(batchwise.aot, weightings=_EQUAL, batchwise=True),
  'aot_unpaired': Loss(
    batchwise.aot_unpaired, weightings=_EQUAL, batchwise=True
  ),
  # of the policy's own likelihood
  'sft': Loss(
    likelihoods.sft,
    ('sft', 'pairs', 'rankings'),
    reference=False,
    preference=False,
    reductions=('sum', 'mean', 'batch_mean'),
  ),
  'unlikelihood': Loss(
    likelihoods.unlikelihood, reference=False, reductions=('sum', 'mean')
  ),
  'token_unlikelihood': Loss(
    likelihoods.token_unlikelihood,
    reference=False,
    reductions=('sum',),
    needs=('complements',),
  ),
  'slic': Loss(likelihoods.slic, reference=False, reductions=('sum', 'mean')),
  'simpo': Loss(likelihoods.simpo, reference=False, reductions=('mean', 'sum')),
  'orpo': Loss(likelihoods.orpo, reference=False, reductions=('mean',)),
  'cpo': Loss(likelihoods.cpo, reference=False, reductions=('sum',)),
  'likelihood_penalty': Loss(
    likelihoods.likelihood_penalty,
    _KWISE,
    reference=False,
    preference=False,
    reductions=('mean',),
    needs=('costs',),
  ),
  # of a reward model's scores
  'bradley_terry': Loss(
    comparisons.bradley_terry, needs=('rewards',), **_OF_HEADS
  ),
  'reward_plackett_luce': Loss(comparisons.reward_plackett_luce, **_OF_HEADS),
}

# Sums of losses that have a name of their own: loss -> the options it sets.
SUMS = {
  # Mixed preference optimization, Wang et al. 2024, arXiv:2411.10442, with the
  # weights of TRL's documentation.
  'mpo': {
    'dpo': {'weight': 0.8},
    'bco': {'weight': 0.2, 'shift': 'none', 'beta': 0.1},
    'sft': {'weight': 1.0, 'reduction': 'batch_mean'},
  },
}

# What other libraries call our losses: name there -> (name here, options).
ELSEWHERE = {
  'sigmoid': ('dpo', {}),
  'sigmoid_norm': ('dpo_norm', {}),
  'rso': ('hinge', {}),
  'exo_pair': ('exo', {}),
  'nca_pair': ('nca', {}),
  'bco_pair': ('bco', {'shift': 'none'}),
  'sppo_hard': ('sppo', {}),
  'aot_pair': ('aot', {}),
  'kto_pair': ('kto', {}),
}
# Names that are no loss here, and what to use instead.
INSTEAD = {
  'ipo': "two losses: 'ipo_sum' (the paper's) and 'ipo_mean' (TRL's)",
  'tdpo': "two losses: 'tdpo1' and 'tdpo2'",
  'apo': "three losses: 'apo_zero', 'apo_down' and 'apo_zero_unpaired'",
  'wpo': 'an option: --config.loss.dpo.weighting=wpo',
  'reward': "two losses of a reward model: 'bradley_terry' and"
  " 'reward_plackett_luce'",
  'ld': 'an option: --config.loss.dpo.reduction=ld:0.5',
  'f_dpo': 'an option: --config.loss.dpo.link=forward_kl',
  'tr_dpo': 'a reference: reference=ema behind the colon of --config',
}


def get(name):
  """Returns the table row; an unknown name raises with the nearest one."""
  if name in INSTEAD:
    raise ValueError(f'loss {name!r} is here {INSTEAD[name]}')
  return names.look_up(LOSSES, 'loss', name)


def options(name, **changes):
  """Returns all options of a loss with their defaults, as configs hold them."""
  loss = get(name)
  out = {
    'weight': 1.0,  # of this loss in the sum
    'reduction': loss.reductions[0],
    'weighting': 'none',
    'labels': 'hard',  # see `choices.LABELS`
  }
  for keyword in choices.keywords(loss.function):
    default = keyword.default
    if keyword.name == 'link':
      default = next(k for k, f in choices.LINKS.items() if f is default)
    out[keyword.name] = default
  unknown = set(changes) - set(out)
  if unknown:
    raise ValueError(f'loss {name!r} takes {sorted(out)}, not {min(unknown)!r}')
  return out | changes


def section(text):
  """Reads 'dpo', 'dpo+sft', 'mpo' or a name from elsewhere: {name: options}."""
  if text in SUMS:
    return {name: options(name, **o) for name, o in SUMS[text].items()}
  out = {}
  for part in str(text).split('+'):
    if part in SUMS or not part:
      raise ValueError(
        f'{text!r}: name one loss between two +; {", ".join(SUMS)} stands alone'
      )
    name, changes = ELSEWHERE.get(part, (part, {}))
    if name in out:
      raise ValueError(f'loss {name!r} stands twice in {text!r}')
    out[name] = options(name, **changes)
  return out


def common_forms(loss_names):
  """Returns the forms of data that all of these losses can learn from."""
  rows = [get(name) for name in loss_names]
  forms = [
    form for form in rows[0].forms if all(form in row.forms for row in rows)
  ]
  if not forms:
    needs = ', '.join(f'{n!r} {"/".join(get(n).forms)}' for n in loss_names)
    raise ValueError(f'no form of data suits all of these losses: {needs}')
  return forms


class Term(NamedTuple):
  """One loss of a sum, with everything chosen."""

  name: str
  loss: Loss
  function: Callable  # scores -> [...]
  weight: float
  reduction: str
  reduce: Callable  # see `choices`
  weighting: str
  weigh: Callable  # see `choices`
  soft: bool
  needs: frozenset  # optional fields of Scores, with these options
  of_pairs: bool  # a choice compares the two responses of a pair
  memory: dict  # before the first batch, zeros
  remember: Callable  # scores -> memory
  reward_scale: float  # times rho: the reward that is logged


def bind(terms):
  """Turns a config's {loss: options} into terms, or says what does not fit.

  Every option must be there, and be supported by its loss. Terms stand in the
  order of the table, because a saved config has none.
  """
  if not terms:
    raise ValueError('no loss is given; name one of the table')
  if len({get(name).head for name in terms}) > 1:
    raise ValueError(
      f'{"+".join(terms)}: some of these losses are of a reward model, whose'
      ' head scores responses, and some of log-probs; train one or the other'
    )
  return tuple(
    _bind(name, dict(terms[name])) for name in LOSSES if name in terms
  )


def of_head(loss_names):
  """Whether these losses are a reward model's, whose head scores responses."""
  return any(get(name).head for name in loss_names)


def of_rewards(terms):
  """Returns the term whose implicit reward is logged.

  The first that looks at preferences, with a reference if one of them has it.
  """
  return min(terms, key=lambda t: (not t.loss.preference, not t.loss.reference))


def _bind(name, values):
  loss = get(name)
  if set(values) != set(options(name)):
    raise ValueError(
      f'loss {name!r} takes {sorted(options(name))}, got {sorted(values)}'
    )
  weight, reduction, weighting, labels = (
    values.pop(key) for key in ('weight', 'reduction', 'weighting', 'labels')
  )
  if not 0.0 < weight < math.inf:
    raise ValueError(f'loss {name!r}: weight {weight} must be above 0')
  reduce = choices.choose(choices.REDUCTIONS, 'reduction', reduction)
  kind = reduction.partition(':')[0]
  if kind not in loss.reductions:
    raise ValueError(
      f'loss {name!r} supports no reduction {kind!r}; use one of'
      f' {loss.reductions}'
    )
  weigh = choices.choose(choices.WEIGHTINGS, 'weighting', weighting)
  if weighting not in loss.weightings:
    raise ValueError(
      f'loss {name!r} supports no weighting {weighting!r}; use one of'
      f' {loss.weightings}'
    )
  soft = names.look_up(choices.LABELS, 'labels', labels)
  if soft and (
    loss.batchwise
    or not loss.preference
    or 'p' in loss.needs
    or 'pairs' not in loss.forms
  ):
    raise ValueError(
      f"loss {name!r} supports no soft labels; leave labels at 'hard'"
      + (': it uses p itself' if 'p' in loss.needs else '')
    )
  link = values.get('link')
  if link is not None:
    values['link'] = choices.choose(choices.LINKS, 'link', link)
    if link != 'reverse_kl' and kind in choices.PER_TOKEN:
      raise ValueError(
        f'loss {name!r}: link {link!r} is a function of the ratio of whole'
        " responses; use reduction 'sum' or 'ld'"
      )
  for option, value in values.items():
    low, high = _RANGES.get(option, (-math.inf, math.inf))
    if isinstance(value, (int, float)) and not low <= value <= high:
      raise ValueError(
        f'loss {name!r}: {option} {value} must lie in [{low:g}, {high:g}]'
      )
  function = functools.partial(loss.function, **values)
  jax.eval_shape(function, _ANY)  # raises where a value makes no sense
  remember = functools.partial(loss.remember or _nothing, **values)
  memory = jax.tree.map(jnp.zeros_like, jax.eval_shape(remember, _ANY))
  needs = set(loss.needs)
  if 'reward_temperature' in values:  # which of the two is the target
    needs.discard('p' if values['reward_temperature'] else 'rewards')
  if not values.get('margin_scale', 1.0):
    needs.discard('rewards')
  return Term(
    name=name,
    loss=loss,
    function=function,
    weight=weight,
    reduction=reduction,
    reduce=reduce,
    weighting=weighting,
    weigh=weigh,
    soft=soft,
    needs=frozenset(needs),
    of_pairs=soft or kind in choices.OF_PAIRS,
    memory=memory,
    remember=remember,
    reward_scale=values.get('beta', 1.0),
  )


# What makes sense in every loss; a number that is none lies in no range.
_TINY, _HUGE = 1e-12, 1e12
_RANGES = {
  'beta': (_TINY, _HUGE),
  'tau': (_TINY, _HUGE),
  'beta_prime': (_TINY, _HUGE),
  'label_smoothing': (0.0, 1.0),
  'reward_temperature': (0.0, _HUGE),
  'eta': (0.0, _HUGE),
  'margin_scale': (0.0, _HUGE),
  'centering': (0.0, _HUGE),
  'desirable_weight': (0.0, _HUGE),
  'undesirable_weight': (0.0, _HUGE),
}

# Scores with everything, and more responses than anybody has. Shapes, not
# arrays: importing this must not start JAX's devices.
_ANY = scoring.Scores(
  p=jax.ShapeDtypeStruct((1,), jnp.float32),
  mask=jax.ShapeDtypeStruct((1,), bool),
  **dict.fromkeys(
    scoring.OF_RESPONSES, jax.ShapeDtypeStruct((1, 99), jnp.float32)
  ),
)


def _nothing(scores, **keywords):
  """What a loss without a memory remembers."""
  del scores, keywords
  return {}


def values(term, scores):
  """Returns the losses of a term [...], its own weight not yet applied."""
  out = term.function(scores)
  if term.soft:
    if scores.policy.shape[-1] != 2:
      raise ValueError(
        f"loss {term.name!r}: labels 'soft' are for pairs, not for"
        f' {scores.policy.shape[-1]} responses'
      )
    flipped = scoring.take_responses(scores, slice(None, None, -1))
    out = scores.p * out + (1.0 - scores.p) * term.function(flipped)
  if term.weighting == 'none':
    return out
  return out * jax.lax.stop_gradient(term.weigh(scores.confidences))


def make(name, **changes):
  """Returns a function of Scores: a loss with options changed, by name.

  `make('dpo', beta=0.2, link='forward_kl')(scores)` gives losses [...].
  """
  (term,) = bind({name: options(name, **changes)})
  return functools.partial(values, term)
