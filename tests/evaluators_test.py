import dataclasses
import itertools

import jax
import numpy as np
import pytest

from dpo_jax import evaluators
from dpo_jax import policies
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import reweighting
from dpo_jax import runs
from dpo_jax import sharding
from dpo_jax.data import batches
from dpo_jax.data import tokenizers
from dpo_jax.models import presets
from tests import worlds

MESH = {'data': -1, 'fsdp': 1, 'tensor': 1}


def test_heldout_means_do_not_depend_on_the_batch_size():
  config, mesh = worlds.LLAMA, sharding.make_mesh(**MESH)
  params, ref = worlds.params_of(config), worlds.params_of(config, seed=1)
  sums = worlds.make_sums(config)
  groups = worlds.make_groups(11)
  found = []
  for batch_size in (11, 4):  # 4 leaves a tail of three
    plan = batches.evaluation_plan(
      groups, batch_size=batch_size, row_length=48, multiple=8, window=None
    )
    evaluate = evaluators.make_heldout(sums, plan, mesh, ref_values=None)
    found.append(evaluate({'params': params}, {'params': ref}, {}))
  assert found[0]['groups'] == found[1]['groups'] == 11
  accuracy = found[0]['rewards/accuracy']
  assert 0 < accuracy < 1
  np.testing.assert_allclose(
    found[0]['rewards/accuracy_se'], np.sqrt(accuracy * (1 - accuracy) / 11)
  )
  for name, value in found[0].items():
    np.testing.assert_allclose(found[1][name], value, rtol=1e-5, err_msg=name)


def by_hand(config, params, ref_params, group):
  """What `make_compare` says of a response, of one plain sequence."""
  sequence = np.concatenate([group.prompt, group.responses[0]])
  tokens = np.zeros((1, 16), np.int32)  # one shape; what is padded comes last
  tokens[0, : len(sequence)] = sequence
  p = worlds.plain_log_probs(config, params, tokens)
  q = worlds.plain_log_probs(config, ref_params, tokens)
  p, q = (x[len(group.prompt) - 1 : len(sequence) - 1] for x in (p, q))
  chosen = np.arange(len(p)), group.responses[0]
  return {
    'kl': np.sum(np.exp(p) * (p - q)),
    'kl_sampled': np.sum(p[chosen] - q[chosen]),
    'entropy': -np.sum(np.exp(p) * p) / len(p),
  }


@pytest.mark.parametrize('cap', [None, 0.5])
def test_sequence_kl_equals_separate_sequences(cap):
  config = dataclasses.replace(worlds.LLAMA, logit_cap=cap)
  mesh = sharding.make_mesh(**MESH)
  params, ref = worlds.params_of(config), worlds.params_of(config, seed=1)
  groups = worlds.make_groups(3, responses=1)
  plan = batches.uniform_plan(
    groups,
    max_prompt=9,
    max_response=7,
    row_groups=1,
    batch_rows=2,
    multiple=8,
  )
  compare = evaluators.make_compare(config, mesh, chunk=4)
  found = compare({'params': params}, {'params': ref}, plan)
  for name in ('kl', 'kl_sampled', 'entropy'):
    expected = [by_hand(config, params, ref, g)[name] for g in groups]
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, err_msg=name)
  same = compare({'params': params}, {'params': params}, plan)
  np.testing.assert_allclose(same['kl'], 0, atol=1e-5)
  np.testing.assert_allclose(same['kl_sampled'], 0, atol=1e-5)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_samples_are_measured(temperature):
  config = worlds.dataclasses.replace(worlds.LLAMA, vocab_size=257)
  tokenizer = tokenizers.ByteTokenizer()
  evaluate = evaluators.make_samples(
    config,
    tokenizer,
    [np.array(tokenizer.encode(text), np.int32) for text in ('one', 'three')],
    sharding.make_mesh(**MESH),
    chunk=4,
    key=jax.random.key(0),
    samples_per_prompt=3,
    max_new_tokens=5,
    temperature=temperature,
    top_p=1.0,
    batch_size=8,
    scorers={
      'reward': ('length', rewards.length),
      'ranker': ('length', rewards.length),
      'digits': ('rule:digits', rewards.get('rule:digits')),
    },
    cost='negative',
  )
  policy = {'params': worlds.params_of(config)}
  values, records = evaluate(
    policy, {'params': worlds.params_of(config, seed=1)}
  )
  assert [r['prompt'] for r in records] == ['one'] * 3 + ['three'] * 3
  lengths = [len(r['response']) for r in records]
  assert [r['reward'] for r in records] == lengths
  np.testing.assert_allclose(values['reward'], np.mean(lengths))
  by_prompt = np.reshape(lengths, (2, 3)).mean(1)
  np.testing.assert_allclose(
    values['reward_se'], abs(by_prompt[0] - by_prompt[1]) / 2
  )
  texts = [r['response'] for r in records]
  assert values['distinct_2'] == rewards.distinct_n(texts, 2)
  error = rewards.distinct_n_error(texts, 2, per_prompt=3)
  assert values['distinct_2_se'] == error
  costs = [r['cost'] for r in records]
  assert costs == list(rewards.negative([], [r['response'] for r in records]))
  np.testing.assert_allclose(values['cost'], np.mean(costs))
  assert 0 <= values['cost_se'] <= 0.5
  kept = [r['digits'] for r in records]
  digits = rewards.digits([], [r['response'] for r in records])
  assert kept == list(1.0 - digits)
  assert values['digits'] == np.mean(kept)
  # The best of one is any, that of all is the longest.
  assert [r['ranker'] for r in records] == lengths
  for name in ('reward', 'reward_se', 'digits', 'cost', 'cost_se'):
    np.testing.assert_allclose(values[f'best_of_1/{name}'], values[name])
  longest = np.reshape(lengths, (2, 3)).max(1)
  np.testing.assert_allclose(values['best_of_3/reward'], longest.mean())
  assert 'best_of_2/kl' in values and 'best_of_4/kl' not in values
  # Only samples of the policy itself give an honest KL.
  assert ('kl' in values) == (temperature == 1.0)
  if temperature == 1.0:
    assert values['kl'] > 0.01
    same, again = evaluate(policy, policy)
    assert abs(same['kl']) < 1e-5
    assert [r['response'] for r in again] == [r['response'] for r in records]


@pytest.mark.parametrize('arg', ['loss=dpo', 'loss=dpo,adapter=lora'])
def test_weights_gathered_before_sampling_give_the_same_samples(
  tmp_path, monkeypatch, arg
):
  even = dataclasses.replace(presets.DEBUG['debug-llama'], vocab_size=258)
  monkeypatch.setitem(presets.DEBUG, 'debug-llama', even)
  sizes = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}
  prompts = [g.prompt for g in worlds.make_groups(5)]
  found, places = [], []
  for share in (0.0, 0.25):
    config = worlds.debug_config(
      tmp_path, arg, **sizes, **{'model.gather_share': share}
    )
    mesh = sharding.make_mesh(**config.mesh)
    policy = policies.open_policy(config, mesh)
    variables = policy.variables(policy.trained)
    with sharding.use(mesh):
      found.append(
        evaluators.sample(
          policy.config,
          policy.tokenizer,
          variables,
          prompts,
          title='',
          key=jax.random.key(0),
          max_new_tokens=6,
          temperature=1.0,
          top_p=1.0,
          batch_size=8,
        )
      )
      how = evaluators.how_to_sample(policy.config, variables)
      places.append(how['places'])
      assert how['apart'] == bool(share)
  np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
  np.testing.assert_allclose(
    found[0].token_logps, found[1].token_logps, atol=1e-5
  )
  cut, whole = (
    {axis for leaf in jax.tree.leaves(x) for axis in leaf.spec} for x in places
  )
  assert {'fsdp', 'tensor'} <= cut and 'fsdp' not in whole
  assert 'tensor' in whole


def test_the_best_of_n_is_the_mean_over_all_subsets():
  rng = np.random.default_rng(0)
  ranker, reward = rng.normal(size=(2, 5, 6))  # N = 5, S = 6
  ranker[0, 1] = ranker[0, 2]
  values = evaluators.best_of_n(ranker, {'reward': reward})
  assert {name.split('/')[0] for name in values} == {
    f'best_of_{n}' for n in (1, 2, 4, 6)
  }
  for n in (1, 2, 4, 6):
    expected = [
      np.mean(
        [
          reward[prompt, max(subset, key=lambda s: (ranker[prompt, s], -s))]
          for subset in itertools.combinations(range(6), n)
        ]
      )
      for prompt in range(5)
    ]
    found = {
      name: values[f'best_of_{n}/{name}']
      for name in ('reward', 'reward_se', 'kl', 'kl_se')
    }
    np.testing.assert_allclose(found['reward'], np.mean(expected))
    se = np.std(expected, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(found['reward_se'], se)
    # Of 6 samples with replacement, all prompts but the first have no ties.
    shares = (np.arange(7) / 6) ** n
    no_ties = np.sum(np.diff(shares) * np.log(np.diff(shares) * 6))
    first = 5 * found['kl'] - 4 * no_ties
    assert (0.0 < first < no_ties) if n > 1 else abs(first) < 1e-12
    assert found['kl'] <= reweighting.best_of_kl_bound(n) + 1e-12


def test_best_of_n_needs_samples_to_choose_from(tmp_path):
  config = worlds.debug_config(
    tmp_path, **{'eval.samples.ranker': 'length', 'eval.samples.reward': 'none'}
  )
  how = config.eval.samples
  with pytest.raises(ValueError, match='samples_per_prompt is 1; set it to 2'):
    runs.measured(how)
  how = dict(how) | {'samples_per_prompt': 2, 'judges': ('vader',)}
  assert runs.measured(how) == {'ranker': 'length', 'vader': 'vader'}
  how |= {'reward': '', 'ranker': 'none'}
  assert runs.measured(how, 'x') == {'reward': 'x', 'vader': 'vader'}


def test_judges_have_titles_of_their_own():
  names = ['vader', 'python:math.hypot', 'rule:digits', 'sentiment:a/b.npz']
  assert reward_models.titles(names) == dict(
    zip(['vader', 'hypot', 'digits', 'b'], names)
  )
  with pytest.raises(ValueError, match="'length' would be called 'length'"):
    reward_models.titles(['length'])
