"""Whole runs of independent implementations, replayed through our step."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import evaluators
from dpo_jax import optim
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax import weights
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.losses import table
from tests import worlds

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FAMILY = GOLDEN / 'run_trl_family'
KTO = GOLDEN / 'run_trl_kto'

OPTIMIZERS = {'adamw_torch': 'adamw', 'rmsprop': 'rmsprop'}
NAMES = ('input_ids', 'attention_mask', 'completion_mask')


def read_sequences(arrays, prefix):
  """Returns (prompt, response) of each right-padded sequence of a batch."""
  ids, attend, scored = (arrays[prefix + name] for name in NAMES)
  return [
    (
      row[(real == 1) & (answer == 0)].astype(np.int32),
      row[answer == 1].astype(np.int32),
    )
    for row, real, answer in zip(ids, attend, scored)
  ]


def pairs_of(arrays, step):
  """Turns one [2B, T] batch, chosen sequences first, into groups."""
  sequences = read_sequences(arrays, f'{step}/')
  half = len(sequences) // 2
  return [
    group_of(chosen, rejected, 1.0)
    for chosen, rejected in zip(sequences[:half], sequences[half:])
  ]


def labelled_of(arrays, step):
  """Turns one [B, T] batch of KTO and its mismatched one into groups."""
  own = read_sequences(arrays, f'{step}/')
  other = read_sequences(arrays, f'{step}/KL_')
  labels = arrays[f'{step}/label']
  return [group_of(a, b, float(p)) for a, b, p in zip(own, other, labels)]


def group_of(first, second, p):
  np.testing.assert_array_equal(first[0], second[0])
  return examples.Group(first[0], (first[1], second[1]), 1.0, p, '')


def replay(
  folder, args, section, *, row_length, groups_of=pairs_of, form='pairs'
):
  """Returns the metrics of our step over the folder's batches: {name: [N]}."""
  arrays = np.load(folder / 'batches.npz')
  models = folder.parent / args.get('models', folder.name)
  policy = weights.load(models / 'policy0')
  ref = weights.load(models / 'ref').params
  by_step = [groups_of(arrays, step) for step in range(args['steps'])]
  groups = [group for part in by_step for group in part]
  B = len(by_step[0])
  plan = batches.plan_steps(
    groups,
    [list(range(s * B, (s + 1) * B)) for s in range(len(by_step))],
    row_length=row_length,
    multiple=1,
    window=None,
  )
  mesh = jax.make_mesh(
    (1, 1, 1),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:1],
  )
  schedule = optim.learning_rate(
    lr=args['lr'],
    schedule='constant',
    warmup_steps=args['lr_warmup'],
    warmup_init=0.0,
    num_steps=args['steps'],
  )
  optimizer = OPTIMIZERS[args['optim']]
  tx = optim.make(
    optimizer,
    schedule,
    clip_norm=args['max_grad_norm'],
    keywords=optim.OPTIMIZERS[optimizer],
  )
  needed = any(table.get(name).reference for name in section)
  ema = None
  if args.get('sync_ref_model'):
    ema = {
      'alpha': args['ref_model_mixup_alpha'],
      'every': args['ref_model_sync_steps'],
    }
  mode = ('ema' if ema else 'frozen') if needed else 'none'
  sums = worlds.make_sums(policy.config, section, reference=mode, form=form)
  step = jax.jit(
    steps.make_step(sums, tx, schedule, batch_size=B, ema=ema),
    donate_argnums=0,
  )
  where = sharding.replicated(mesh)
  params = jax.device_put(jax.tree.map(jnp.array, policy.params), where)
  moving = jax.device_put(jax.tree.map(jnp.array, ref), where) if ema else None
  state = steps.init_state(params, tx, ref=moving)
  out = []
  for number in range(plan.num_steps):
    batch = evaluators.put_batch(plan, number, mesh)
    state, values = step(state, {'base': None, 'ref': ref}, batch)
    out.append(evaluators.means(jax.device_get(values)))
  return {name: np.array([values[name] for values in out]) for name in out[0]}


# --- Three runs of two losses, each with models of its own ---


def miss(folder, *, row_length, **changes):
  """Returns how far our losses and margins are from the recorded ones, [2]."""
  with open(folder / 'metrics.json') as f:
    expected = json.load(f)
  args = expected['args'] | changes
  name = {'sigmoid': 'dpo', 'ipo': 'ipo_mean'}[args['loss']]
  section = {name: table.options(name, beta=args['beta'])}
  here = replay(folder, args, section, row_length=row_length)
  here = np.stack([here['loss'], here['rewards/margin']])
  there = np.asarray([expected['loss'], expected['margin']])
  assert here.shape == there.shape == (2, 10)
  assert np.isfinite(here).all()
  return np.abs(here - there).max(-1)


@pytest.mark.parametrize(
  'name', ['run_trl_sigmoid', 'run_trl_ipo', 'run_torch_rmsprop']
)
def test_runs_of_trl_and_torch_are_followed(name):
  assert max(miss(GOLDEN / name, row_length=64)) < 1e-4


def test_a_wrong_beta_is_noticed():
  misses = miss(GOLDEN / 'run_trl_sigmoid', row_length=64, beta=0.21)
  assert min(misses) > 1e-3


@pytest.mark.parametrize(
  'name', ['trl_sigmoid', 'trl_ipo_mean', 'plain_sigmoid_rmsprop']
)
def test_shared_oracle_runs_are_followed(shared, name):
  assert max(miss(shared / 'oracles' / name, row_length=192)) < 1e-4


# --- The family: one sequence of batches, every loss type of TRL ---

# Run of TRL -> our losses with their options; TRL's beta is added.
FAMILY_LOSSES = {
  'sigmoid': {'dpo': {}},
  'hinge': {'hinge': {}},
  'exo_pair': {'exo': {'label_smoothing': 1e-3}},
  'nca_pair': {'nca': {}},
  'robust': {'robust': {'label_smoothing': 0.1}},
  'bco_pair': {'bco': {'shift': 'none'}},
  'sppo_hard': {'sppo': {}},
  'aot': {'aot': {}},
  'aot_smoothed': {'aot': {'label_smoothing': 0.1}},
  'aot_unpaired': {'aot_unpaired': {}},
  'apo_zero': {'apo_zero': {}},
  'apo_down': {'apo_down': {}},
  'discopop': {'discopop': {}},
  'sigmoid_norm': {'dpo_norm': {}},
  'ld': {'dpo': {'reduction': 'ld:0.5'}},
  'wpo': {'dpo': {'weighting': 'wpo'}},
  'forward_kl': {'dpo': {'link': 'forward_kl'}},
  'js_divergence': {'dpo': {'link': 'js'}},
  'alpha_divergence': {'dpo': {'link': 'alpha:0.5'}},
  'hinge_forward_kl': {'hinge': {'link': 'forward_kl'}},
  'sft': {'sft': {'reduction': 'batch_mean'}},
  'mpo': {
    'dpo': {'weight': 0.8},
    'bco': {'weight': 0.2, 'shift': 'none'},
    'sft': {'reduction': 'batch_mean'},
  },
  'tr_dpo': {'dpo': {}},
  'simpo': {'simpo': {'gamma': 0.5}},
  # TRL's NLL is a mean over the batch's tokens, the method's a sequence's.
  'cpo': {'cpo': {'alpha': 0.0}, 'sft': {'reduction': 'batch_mean'}},
}
# TRL's ORPO takes the NLL over the prompt too, which we never score.
NOT_OURS = {'orpo'}


def read_family(folder, name):
  with open(folder / 'metrics.json') as f:
    family = json.load(f)
  run = family['runs'][name]
  return family['args'] | run['args'], run


def section_of(losses, args):
  """Adds the run's beta to our options."""
  section = {}
  for name, changes in losses.items():
    if 'beta' in table.options(name):
      changes = {'beta': args['beta']} | changes
    if 'eta' in table.options(name):
      changes = {'eta': 1.0 / args['beta']} | changes
    section[name] = table.options(name, **changes)
  return section


def test_every_run_of_the_family_is_followed_or_known():
  with open(FAMILY / 'metrics.json') as f:
    assert set(json.load(f)['runs']) == {*FAMILY_LOSSES, *NOT_OURS}


@pytest.mark.parametrize('name', FAMILY_LOSSES)
def test_runs_of_trls_losses_are_followed(name):
  args, run = read_family(FAMILY, name)
  section = section_of(FAMILY_LOSSES[name], args)
  here = replay(FAMILY, args, section, row_length=64)
  size = np.maximum(np.abs(run['loss']), 1.0)  # SPPO's losses are large
  np.testing.assert_array_less(np.abs(here['loss'] - run['loss']), 1e-4 * size)
  # Clipping and Adam would hide a wrong scale of the gradient.
  np.testing.assert_allclose(here['grad_norm'], run['grad_norm'], rtol=1e-3)
  if table.get(next(iter(section))).reference and name != 'ld':
    # TRL's margin is ours, but for LD, where it is that of partial sums; SPPO
    # has no beta here, so its rewards are log-ratios.
    scale = args['beta'] if name == 'sppo_hard' else 1.0
    margin = scale * here['rewards/margin']
    np.testing.assert_allclose(margin, run['margin'], atol=1e-4)


@pytest.mark.parametrize('name', ['kto', 'apo_zero_unpaired'])
def test_runs_of_trls_kto_are_followed(name):
  args, run = read_family(KTO, name)
  changes = {
    option: args[option]
    for option in ('beta', 'desirable_weight', 'undesirable_weight')
  }
  here = replay(
    KTO,
    args,
    {name: table.options(name, **changes)},
    row_length=64,
    groups_of=labelled_of,
    form='unpaired',
  )
  np.testing.assert_allclose(here['loss'], run['loss'], atol=1e-4)
  np.testing.assert_allclose(here['grad_norm'], run['grad_norm'], rtol=1e-3)
  margin = here['rewards/desirable'] - here['rewards/undesirable']
  np.testing.assert_allclose(margin, run['margin'], atol=1e-4)
  if name == 'kto':
    kl = np.maximum(here['kl/mismatched'], 0.0)
    np.testing.assert_allclose(kl, run['kl'], atol=1e-4)
    assert (kl > 0.1).any() and (kl == 0.0).any()
