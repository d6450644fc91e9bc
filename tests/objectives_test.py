"""Losses on packed rows equal losses of separate sequences, worked out by hand.

By hand: one plain forward pass a sequence, all logits, token quantities and
reductions in NumPy. Ours: prefix-shared rows, chunks, one jitted function.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import evaluators
from dpo_jax import objectives
from dpo_jax import sharding
from dpo_jax.data import batches
from dpo_jax.data import partners
from dpo_jax.losses import scoring
from dpo_jax.losses import table
from dpo_jax.models import heads
from dpo_jax.models import transformer
from tests import worlds

# A soft cap of the logits that is felt: wherever it is forgotten, it shows.
CONFIG = dataclasses.replace(worlds.LLAMA, logit_cap=1.0)
LONGEST = 24


@functools.cache
def models():
  head = heads.init(jax.random.key(2), CONFIG.d_model, scale=1.0)
  head['bias'] += 0.3
  policy = worlds.params_of(CONFIG) | {'head': head}
  return policy, worlds.params_of(CONFIG, seed=1)


@functools.partial(jax.jit, static_argnums=0)
def plain_head_values(config, params, tokens):
  """The head's number at every token of one plain sequence [1, T]: [T]."""
  positions = jnp.arange(tokens.shape[1])[None]
  hidden = transformer.Transformer(config).apply(
    {'params': params}, tokens, positions, 0 * positions, positions + 1
  )
  return hidden[0] @ params['head']['kernel'] + params['head']['bias']


@functools.cache
def data(form):
  """Groups of a form, with every label that a loss may look at."""
  rng = np.random.default_rng(0)
  K = {'pairs': 2, 'rankings': 3}.get(form, 1)
  groups = [
    dataclasses.replace(
      group,
      weight=float(rng.uniform(0.5, 2.0)),
      p=float(rng.uniform(0.6, 1.0)) if form == 'pairs' else float(i % 3 > 0),
      rewards=tuple(sorted(rng.normal(size=K), reverse=True)),
      costs=tuple(rng.uniform(size=K)),
    )
    for i, group in enumerate(worlds.make_groups(13, responses=K))
  ]
  if form == 'rankings':
    groups = [dataclasses.replace(group, p=1.0) for group in groups]
  return partners.mismatched(groups) if form == 'mismatched' else groups


@functools.cache
def tokens_by_hand(form):
  """Per response, per token: log pi, log pi_ref, KL, log sum p^2, head."""
  policy, ref = models()
  out = []
  for group in data(form):
    for response in group.responses:
      sequence = np.concatenate([group.prompt, response])
      padded = np.zeros(LONGEST, np.int32)
      padded[: len(sequence)] = sequence
      where = np.arange(len(group.prompt) - 1, len(sequence) - 1)
      logp, ref_logp = (
        np.asarray(
          worlds.plain_log_probs(CONFIG, params, padded[None]), np.float64
        )[where]
        for params in (policy, ref)
      )
      at = (np.arange(len(response)), response)
      out.append(
        {
          'policy': logp[at],
          'ref': ref_logp[at],
          'kls': (np.exp(ref_logp) * (ref_logp - logp)).sum(-1),
          'collisions': np.log((np.exp(logp) ** 2).sum(-1)),
          'head': np.asarray(plain_head_values(CONFIG, policy, padded[None]))[
            where + 1
          ],
        }
      )
  return out


def scores_by_hand(form, reduction, reference, scored='policy'):
  """Scores [N, K] of all groups of a form, of log-probs or of the head."""
  groups, tokens = data(form), tokens_by_hand(form)
  K = len(groups[0].responses)
  lengths = np.array([len(r['policy']) for r in tokens], float).reshape(-1, K)
  kind, _, number = reduction.partition(':')

  def weights(i, k):
    length = int(lengths[i, k])
    if kind == 'last':
      return np.arange(length) == length - 1
    if kind.startswith('ld'):
      head = int(lengths[i].min())
      tail = length - head
      out = np.array([1.0] * head + [float(number)] * tail)
      return out / length if kind == 'ld_mean' else out
    per = {'sum': 1, 'mean': length, 'batch_mean': lengths[:, k].mean()}
    return np.ones(length) / per[kind]

  def reduced(name):
    return np.array(
      [
        [(weights(i, k) * tokens[i * K + k][name]).sum() for k in range(K)]
        for i in range(len(groups))
      ]
    )

  def summed(values):
    return np.array([v.sum() for v in values]).reshape(-1, K)

  excess = summed([r['policy'] - r['collisions'] for r in tokens])
  fields = {
    'policy': reduced(scored),
    'ref': reduced('ref') if reference else np.zeros(lengths.shape),
    'lengths': lengths,
    'p': np.array([group.p for group in groups]),
    'mask': np.ones(len(groups), bool),
    'rewards': np.array([group.rewards for group in groups]),
    'costs': np.array([group.costs for group in groups]),
    'kls': summed([r['kls'] for r in tokens]),
    'complements': summed([np.log1p(-np.exp(r['policy'])) for r in tokens]),
    'confidences': excess / lengths,
    'memory': None,
  }
  return scoring.Scores(
    **{
      name: value if value is None else jnp.asarray(value)
      for name, value in fields.items()
    }
  )


def loss_by_hand(section, form, reference):
  weight = np.array([group.weight for group in data(form)])
  total = 0.0
  for term in table.bind(section):
    # Only a loss of mismatched responses may see them.
    alone = form == 'mismatched' and not term.loss.mismatched
    scores = scores_by_hand(
      'unpaired' if alone else form,
      term.reduction,
      reference,
      'head' if term.loss.head else 'policy',
    )
    total += term.weight * (weight * np.asarray(table.values(term, scores)))
  return total.sum()


def run(section, form, transform=lambda function: function, devices=1):
  """Returns the summed loss of all groups in packed rows, or its transform."""
  groups = data(form)
  mesh = jax.make_mesh(
    (devices, 1, 1),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:devices],
  )
  reference = any(table.get(name).reference for name in section)
  sums = worlds.make_sums(
    CONFIG,
    section,
    reference='frozen' if reference else 'none',
    responses=len(groups[0].responses),
    form='unpaired' if form == 'mismatched' else form,
    rewards=True,
  )
  plan = batches.evaluation_plan(
    groups,
    batch_size=len(groups),
    row_length=64,
    multiple=8,
    window=None,
  )
  memory = objectives.first_memory(table.bind(section))
  policy, ref = models()

  def loss(params, batch):
    totals, _ = sums({'params': params}, {'params': ref}, batch, memory)
    return totals['loss'][0]

  with sharding.use(mesh):
    batch = evaluators.put_batch(plan, 0, mesh)
    return jax.device_get(jax.jit(transform(loss))(policy, batch))


def form_of(name):
  row = table.get(name)
  return 'mismatched' if row.mismatched else row.forms[0]


# Every loss as it is, and every choice at least once.
CASES = [({name: table.options(name)}, form_of(name)) for name in table.LOSSES]
CASES += [
  ({'dpo': table.options('dpo', reduction='ld:0.3')}, 'pairs'),
  ({'dpo_norm': table.options('dpo_norm', reduction='ld_mean:0')}, 'pairs'),
  ({'dpo': table.options('dpo', weighting='wpo')}, 'pairs'),
  ({'ipo_sum': table.options('ipo_sum', weighting='wpo_clamped')}, 'pairs'),
  ({'ipo_sum': table.options('ipo_sum', labels='soft')}, 'pairs'),
  ({'hinge': table.options('hinge', link='js', beta=2.0)}, 'pairs'),
  ({'exo': table.options('exo', link='alpha:0.4')}, 'rankings'),
  ({'nca': table.options('nca', reward_temperature=0.7)}, 'rankings'),
  ({'infonca': table.options('infonca', reward_temperature=2.0)}, 'rankings'),
  ({'plackett_luce': table.options('plackett_luce', top=1)}, 'rankings'),
  ({'sft': table.options('sft', reduction='batch_mean')}, 'sft'),
  (
    {
      'bradley_terry': table.options(
        'bradley_terry', margin_scale=0.5, centering=0.2
      )
    },
    'rankings',
  ),
  (
    {'reward_plackett_luce': table.options('reward_plackett_luce')},
    'rankings',
  ),
  ({'bco': table.options('bco')}, 'unpaired'),
  (table.section('mpo'), 'pairs'),
  (table.section('dpo+likelihood_penalty+tdpo2'), 'pairs'),
  (table.section('kto+bco'), 'mismatched'),
  (
    {
      'kto': table.options('kto'),
      'apo_zero_unpaired': table.options('apo_zero_unpaired', weighting='wpo'),
    },
    'mismatched',
  ),
]


def case_id(case):
  section, form = case
  changed = [
    f'{option}={value}'
    for name, options in section.items()
    for option, value in options.items()
    if value != table.options(name)[option]
  ]
  return '-'.join(['+'.join(section), form, *changed])


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_rows_equal_separate_sequences(case):
  section, form = case
  reference = any(table.get(name).reference for name in section)
  value = run(section, form)
  expected = loss_by_hand(section, form, reference)
  np.testing.assert_allclose(value, expected, rtol=2e-5)


@pytest.mark.parametrize(
  'text, form',
  [
    ('aot+aot_unpaired+dr_dpo+bco+tdpo1', 'pairs'),
    ('mpo', 'pairs'),
    ('kto', 'mismatched'),
    ('plackett_luce', 'rankings'),
    ('bradley_terry', 'pairs'),
  ],
)
def test_batch_terms_on_eight_devices_equal_one(text, form):
  section = table.section(text)
  (one, one_grads), (many, many_grads) = (
    run(section, form, jax.value_and_grad, devices) for devices in (1, 8)
  )
  np.testing.assert_allclose(many, one, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    many_grads,
    one_grads,
  )


def test_the_running_mean_of_bco_counts_all_rewards_so_far():
  section = {'bco': table.options('bco', beta=0.5)}
  policy, ref = models()
  sums = worlds.make_sums(CONFIG, section)
  (term,) = table.bind(section)
  memory = objectives.first_memory((term,))
  plan = batches.evaluation_plan(
    data('pairs'), batch_size=5, row_length=64, multiple=1, window=None
  )
  step = jax.jit(sums)
  seen = []
  scores = scores_by_hand('pairs', 'sum', True)
  rewards = 0.5 * np.asarray(scores.policy - scores.ref)
  for number in range(plan.num_steps):  # 5, 5 and 3 pairs
    batch = plan.batch(number)
    _, memory = step({'params': policy}, {'params': ref}, batch, memory)
    seen += plan.steps[number]
    np.testing.assert_allclose(
      memory['bco']['mean'], rewards[seen].mean(), rtol=1e-4
    )
    assert memory['bco']['count'] == 2 * len(seen)


def test_logged_rewards_are_of_the_first_preference_in_the_table():
  policy, ref = models()
  batch = batches.evaluation_plan(
    data('pairs'), batch_size=13, row_length=64, multiple=1, window=None
  ).batch(0)

  def margin(text, **changes):
    section = table.section(text)
    for name, options in changes.items():
      section[name] |= options
    section = dict(sorted(section.items()))  # as a saved config has them
    totals, _ = jax.jit(worlds.make_sums(CONFIG, section))(
      {'params': policy},
      {'params': ref},
      batch,
      objectives.first_memory(table.bind(section)),
    )
    return totals['rewards/margin'][0]

  alone = margin('plackett_luce', plackett_luce={'beta': 0.3})
  changes = {'plackett_luce': {'beta': 0.3}, 'bco': {'beta': 5.0}}
  assert margin('sft+plackett_luce+bco', **changes) == alone


def test_a_loss_without_its_rewards_says_so():
  section = {'nca': table.options('nca', reward_temperature=1.0)}
  sums = worlds.make_sums(CONFIG, section)
  plan = batches.evaluation_plan(
    data('pairs'), batch_size=13, row_length=64, multiple=1, window=None
  )
  policy, ref = ({'params': params} for params in models())
  with pytest.raises(ValueError, match='the data has no rewards'):
    sums(policy, ref, plan.batch(0), {})
