"""Reward models: trained by the loop, read as rewards, centered, exported."""

import jax
import numpy as np
import pytest

from dpo_jax import conversions
from dpo_jax import metrics
from dpo_jax import objectives
from dpo_jax import policies
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import rounds
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import weights
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.data import tokenizers
from dpo_jax.losses import table
from dpo_jax.models import heads
from dpo_jax.models import presets
from dpo_jax.models import transformer
from tests import worlds

FAST = {'optim.lr': 3e-3, 'optim.warmup_steps': 0, 'num_steps': 3}


def mesh():
  return sharding.make_mesh(data=-1, fsdp=1, tensor=1)


def shapes(tree):
  return jax.tree.map(lambda x: x.shape, tree)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of a reward model from an SFT run: (folder, config)."""
  folder = tmp_path_factory.mktemp('run')
  sft = worlds.debug_config(folder, 'loss=sft', **FAST)
  train.train(sft, folder / 'sft')
  config = worlds.debug_config(
    folder,
    'loss=bradley_terry,optim=adamw',
    **FAST | {'optim.lr': 1e-3, 'num_steps': 12, 'init': str(folder / 'sft')},
  )
  train.train(config, folder / 'rm')
  return folder, config


def test_the_loop_trains_head_and_trunk_from_a_run_without_a_head(run):
  folder, config = run
  before = policies.open_policy(
    config, mesh(), workdir=str(folder / 'sft'), head=1.0
  )
  after = policies.open_policy(
    config, mesh(), workdir=str(folder / 'rm'), head=1.0
  )
  assert (before.step, after.step) == (3, 12)
  abstract = policies.abstract_policy(config, mesh(), head=1.0).trained
  assert shapes(abstract) == shapes(after.trained)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), after.trained, before.trained
  )
  assert moved['head']['kernel'] > 1e-3
  assert moved['layers']['mlp']['up'] > 1e-3
  records = metrics.read(folder / 'rm')
  losses = [r['heldout/loss'] for r in records if 'heldout/loss' in r]
  assert losses[-1] < losses[0] - 0.02
  names = {name for r in records for name in r}
  assert {'heldout/rewards/mean', 'train/rewards/accuracy'} <= names
  assert not any('logps' in name for name in names)
  for record in records:
    if 'heldout/rewards/mean' in record:
      sides = [record[f'heldout/rewards/{x}'] for x in ('chosen', 'rejected')]
      np.testing.assert_allclose(
        record['heldout/rewards/mean'], np.mean(sides), atol=1e-6
      )


def test_scores_of_text_are_those_that_training_measured(run):
  folder, config = run
  rows = [*map(worlds.json.loads, open(folder / 'pairs.jsonl'))]
  pairs = [dict(row, id='', weight=1.0, p=1.0, chat=False) for row in rows]
  for row in pairs:
    row |= {'chosen_ended': True, 'rejected_ended': True}
    row |= {'chosen_reward': None, 'rejected_reward': None}
  groups, _ = examples.tokenize(
    pairs,
    tokenizers.ByteTokenizer(),
    max_prompt_tokens=64,
    max_response_tokens=64,
    form='pairs',
  )
  reward = reward_models.load(str(folder / 'rm'))
  plan = batches.evaluation_plan(
    groups, batch_size=len(groups), row_length=128, multiple=8, window=None
  )
  policy = policies.open_policy(
    config, mesh(), workdir=str(folder / 'rm'), head=1.0
  )
  sums = worlds.make_sums(policy.config, 'bradley_terry', reference='none')
  totals, _ = jax.jit(sums)({'params': policy.trained}, None, plan.batch(0), {})
  scores = {}
  for number, side in enumerate(('chosen', 'rejected')):
    prompts = [row['prompt'] for row in rows]
    scores[side] = reward(prompts, [row[side] for row in rows])
    by_tokens = reward.score_tokens(
      [g.prompt for g in groups], [g.responses[number] for g in groups]
    )
    np.testing.assert_array_equal(scores[side], by_tokens)
    mean = float(totals[f'rewards/{side}'][0]) / len(groups)
    np.testing.assert_allclose(
      scores[side].mean() + reward.offset, mean, atol=1e-5
    )
  correct = np.sum(scores['chosen'] > scores['rejected'])
  assert correct == float(totals['rewards/accuracy'][0])
  # Any number of texts of any length, and in any company.
  some = reward(
    prompts[:3] + ['a' * 99], ['x', '', rows[2]['chosen'], 'b' * 99]
  )
  np.testing.assert_allclose(some[2], scores['chosen'][2], atol=1e-5)
  assert np.isfinite(some).all() and len({*some}) == 4
  assert reward([], []).shape == (0,)


def test_a_response_that_was_cut_is_scored_without_an_eos(run):
  folder, _ = run
  reward = reward_models.load(str(folder / 'rm'))
  tokenizer = tokenizers.ByteTokenizer()
  prompts, responses = ['one', 'two'], ['abc', 'defg']
  tokens = [tokenizer.encode(text) for text in responses]
  tokens[0].append(tokenizer.eos_id)  # the first ended, the second was cut
  by_tokens = reward.score_tokens(
    [np.array(tokenizer.encode(text), np.int32) for text in prompts],
    [np.array(ids, np.int32) for ids in tokens],
  )
  scored = rewards.score(reward, prompts, responses, ended=[True, False])
  np.testing.assert_array_equal(scored, by_tokens)
  both = rewards.score(reward, prompts, responses)
  assert both[0] == scored[0]
  assert abs(both[1] - scored[1]) > 1e-4


def test_the_mean_held_out_score_is_taken_off(run):
  folder, _ = run
  last = metrics.read(folder / 'rm')[-1]['heldout/rewards/mean']
  texts = ['question: '], ['aeiou']
  newest = reward_models.load(str(folder / 'rm'))
  named = reward_models.get(f'model:{folder / "rm"}@12')
  for reward in (newest, named):
    assert reward.offset == last != 0.0
  # A reward like any other.
  (value,) = rewards.score(named, *texts)
  named.offset = 0.0
  np.testing.assert_allclose(named(*texts) - last, value)


@pytest.mark.parametrize(
  'name, workdir, which',
  [
    ('runs/rm', 'runs/rm', 'newest'),
    ('runs/rm@best', 'runs/rm', 'best'),
    ('me@home/rm@12', 'me@home/rm', '12'),
    ('me@home/rm', 'me@home/rm', 'newest'),
    ('rm@home@newest', 'rm@home', 'newest'),
    ('rm@there', 'rm@there', 'newest'),  # a folder
  ],
)
def test_an_at_is_of_the_checkpoint_or_of_the_path(
  tmp_path, monkeypatch, name, workdir, which
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'rm@there').mkdir()
  reward_models.check(f'model:{name}')
  opened = []
  monkeypatch.setattr(
    reward_models,
    'load',
    lambda *args, which, **_: opened.append((*args, which)),
  )
  reward_models.get(f'model:{name}')
  assert opened == [(workdir, which)]


@pytest.mark.parametrize(
  'name, message',
  [
    ('model:', 'write model:WORKDIR of a reward model'),
    ('model:rm@nonsense', "'nonsense' is no checkpoint; write model:WORKDIR@"),
    ('model:me@home/rm@bets', "'bets' is no checkpoint; .*newest, best or a"),
    ('model:rm@', "'' is no checkpoint"),
  ],
)
@pytest.mark.parametrize('refuse', [reward_models.check, reward_models.get])
def test_a_name_of_no_checkpoint_is_refused_unopened(refuse, name, message):
  with pytest.raises(ValueError, match=message):
    refuse(name)


def test_every_name_is_a_reward():
  assert reward_models.get('length') is rewards.length
  assert reward_models.get('python:dpo_jax.rewards.vader') is rewards.vader
  with pytest.raises(ValueError, match="did you mean 'vader'"):
    reward_models.get('vadr')


def test_a_policy_is_no_reward_model(run):
  folder, _ = run
  with pytest.raises(ValueError, match='is no run of a reward model'):
    reward_models.load(str(folder / 'sft'))
  with pytest.raises(ValueError, match='is no run of a reward model'):
    reward_models.get(f'model:{folder / "nothing"}')


def test_a_score_that_was_never_measured_is_asked_for(run, tmp_path):
  folder, _ = run
  (tmp_path / 'rm').symlink_to(folder / 'rm')
  with pytest.raises(ValueError, match=r'of step 99, .*hold some data out'):
    reward_models._mean_score(str(tmp_path / 'rm'), 99)


def test_a_policy_begins_at_a_reward_models_trunk(run):
  folder, _ = run
  config = worlds.debug_config(folder, 'loss=dpo', init=str(folder / 'rm'))
  policy = policies.open_policy(config, mesh())
  model = policies.open_policy(
    config, mesh(), workdir=str(folder / 'rm'), head=1.0
  )
  assert 'head' not in policy.trained
  jax.tree.map(
    np.testing.assert_array_equal, policy.trained, heads.without(model.trained)
  )


def test_convert_writes_the_trunk_and_says_so(run, tmp_path):
  folder, config = run
  text = conversions.convert(folder / 'rm', tmp_path / 'model')
  assert 'without its head' in text
  model = policies.open_policy(
    config, mesh(), workdir=str(folder / 'rm'), head=1.0
  )
  written = weights.assemble(weights.open_checkpoint(tmp_path / 'model'))
  np.testing.assert_array_equal(
    written['final_norm']['scale'], model.trained['final_norm']['scale']
  )


def test_an_adapter_and_a_head_are_trained_together(tmp_path):
  config = worlds.debug_config(
    tmp_path, 'loss=reward_plackett_luce,adapter=lora', **FAST
  )
  trained = train.train(config, tmp_path / 'run')
  assert set(trained) == {'layers', 'head'}
  new = policies.open_policy(config, mesh(), head=1.0)
  assert np.abs(trained['head']['kernel'] - new.trained['head']['kernel']).max()
  reward = reward_models.load(str(tmp_path / 'run'))
  adapted = reward(['question: '], ['aeiou'])
  reward._variables = {'params': new.base | {'head': trained['head']}}
  assert abs(reward(['question: '], ['aeiou']) - adapted) > 1e-4
  text = conversions.convert(tmp_path / 'run', tmp_path / 'peft')
  assert 'adapter_model.safetensors' in text and 'without its head' in text


@pytest.mark.parametrize(
  'arg, changes, message',
  [
    ('bradley_terry', {'eval.samples.num_prompts': 2}, 'writes none'),
    (
      'bradley_terry',
      {'loss.bradley_terry.margin_scale': 1.0},
      'needs rewards, which the data lacks.* margin_scale to 0',
    ),
  ],
)
def test_what_makes_no_sense_says_so(tmp_path, arg, changes, message):
  config = worlds.debug_config(tmp_path, f'loss={arg}', **changes)
  with pytest.raises(ValueError, match=message):
    train.train(config, tmp_path / 'run')


def test_losses_of_heads_and_of_log_probs_are_not_summed():
  with pytest.raises(ValueError, match='train one or the other'):
    table.bind(table.section('bradley_terry+sft'))


def test_rounds_refuse_a_reward_model(tmp_path):
  config = worlds.debug_config(tmp_path, 'loss=bradley_terry')
  with pytest.raises(ValueError, match='rounds train a policy'):
    rounds.check_losses(config)


def test_pairs_of_equal_rewards_are_dropped_and_counted(tmp_path):
  config = worlds.debug_config(tmp_path, 'loss=bradley_terry', num_steps=1)
  worlds.write_pairs(tmp_path, 20, chosen_reward=1.0, rejected_reward=1.0)
  with pytest.raises(
    ValueError, match=r'all .* pairs of the .* split have ties'
  ):
    train.train(config, tmp_path / 'run')


def test_one_token_and_reversed_responses_score_as_separate_sequences():
  config = presets.DEBUG['debug-gpt2']
  params = transformer.nn.unbox(
    transformer.init_params(config, jax.random.key(0))
  )
  params['head'] = heads.init(jax.random.key(1), config.d_model, scale=1.0)
  groups = worlds.make_groups(4, responses=3, vocab=250)
  groups[0] = examples.Group(
    groups[0].prompt, tuple(r[:1] for r in groups[0].responses), 1.0, 1.0, ''
  )
  values = jax.jit(objectives.make_head_values(config))

  def last_values(plan):
    batch, out = plan.batch(0), {}
    found = np.asarray(values({'params': params}, batch))
    for r, s in np.argwhere(batch['slot'] >= 0):
      g, k = divmod(int(batch['slot'][r, s]), plan.responses)
      out[int(batch['group'][r, g]), k] = found[r, s]  # the last one stays
    return out

  packed = last_values(
    batches.evaluation_plan(
      groups, batch_size=4, row_length=128, multiple=1, window=None
    )
  )
  alone = [
    examples.Group(group.prompt, (response,), 1.0, 1.0, '')
    for group in groups
    for response in group.responses
  ]
  a_row_each = last_values(
    batches.uniform_plan(
      alone,
      max_prompt=9,
      max_response=7,
      row_groups=1,
      batch_rows=12,
      multiple=1,
    )
  )
  for (g, k), value in packed.items():
    np.testing.assert_allclose(value, a_row_each[3 * g + k, 0], atol=2e-5)


# --- A15: how good they are ---


def write_letters(folder, number, *, flips=0.0, seed=0):
  """Pairs of which the response with more vowels is better, but for flips."""
  rng = np.random.default_rng(seed)
  rows = []
  while len(rows) < number:
    texts = [''.join(rng.choice([*'aeioubcdfgh'], 12)) for _ in range(2)]
    counts = [sum(letter in 'aeiou' for letter in text) for text in texts]
    if counts[0] == counts[1]:
      continue
    if (counts[0] < counts[1]) != (rng.random() < flips):
      texts = texts[::-1]
    rows.append(
      {'prompt': f'{len(rows)}: ', 'chosen': texts[0], 'rejected': texts[1]}
    )
  return worlds.write_rows(folder, rows)


@pytest.mark.slow
def test_learned_rewards_are_as_good_as_their_labels(tmp_path):
  found, models = {}, {}
  for name, flips, centering in [
    ('clean', 0.0, 0.0),
    ('flipped', 0.2, 0.0),
    ('centered', 0.0, 0.1),
  ]:
    folder = tmp_path / name
    folder.mkdir()
    config = worlds.debug_config(
      folder,
      'loss=bradley_terry,optim=adamw',
      **{
        'optim.lr': 1e-3,
        'optim.schedule': 'linear',  # the mean wanders while steps are large
        'epochs': 2.0,
        'num_steps': 0,
        'batch_size': 32,
        'log_every': 100,
        'eval.every': 0,
        'eval.max_groups': 0,
        'data.row_length': 256,
        'data.held_out': 0.2,
        'loss.bradley_terry.centering': centering,
      },
    )
    write_letters(folder, 4000, flips=flips)
    train.train(config, folder / 'rm')
    found[name] = metrics.read(folder / 'rm')[-1]
    models[name] = str(folder / 'rm')
  accuracy = {k: v['heldout/rewards/accuracy'] for k, v in found.items()}
  assert accuracy['clean'] >= 0.9
  assert accuracy['flipped'] <= 0.8
  reward = reward_models.load(models['flipped'])
  path = write_letters(tmp_path, 500, seed=1)
  rows = [*map(worlds.json.loads, open(path))]
  prompts = [row['prompt'] for row in rows]
  chosen, rejected = (
    reward(prompts, [row[side] for row in rows])
    for side in ('chosen', 'rejected')
  )
  assert np.mean(chosen > rejected) >= 0.85
  assert abs(found['centered']['heldout/rewards/mean']) < 0.1
  assert abs(accuracy['centered'] - accuracy['clean']) < 0.005
