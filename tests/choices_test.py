"""What can be chosen: every option changes its loss, or refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import choices
from dpo_jax.losses import table
from tests import cases

T = 24  # tokens of the longest response


def tokens(K, B=6, seed=0):
  """(policy, ref) log-probs [B, K, T], zero beyond the lengths [B, K]."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, T, (B, K))
  real = np.arange(T) < lengths[..., None]
  ref = -rng.uniform(0.5, 3.0, (B, K, T))
  policy = np.minimum(ref + 0.5 * rng.standard_normal((B, K, T)), -0.05)
  return np.where(real, policy, 0.0), np.where(real, ref, 0.0), lengths


def reduce(function, values, lengths):
  weights = function(
    jnp.arange(T),
    lengths[..., None],
    lengths.min(-1)[:, None, None],
    lengths.mean(0)[None, :, None],
  )
  return jnp.sum(weights * values, axis=-1)


def outcome(name, **changes):
  """A loss's share of the total, from tokens: [B]."""
  (term,) = table.bind({name: table.options(name, **changes)})
  K = 3 if 'rankings' in term.loss.forms else 2
  policy, ref, lengths = tokens(K)
  # Of mismatched responses, KTO's, the ratio must not be below 1.
  policy[:, 1] += 0.2 * (policy[:, 1] < 0)
  scores = cases.draw(0, K=K)._replace(
    policy=reduce(term.reduce, policy, lengths),
    ref=reduce(term.reduce, ref, lengths),
    lengths=jnp.asarray(lengths, jnp.float32),
  )
  return np.asarray(term.weight * table.values(term, scores))


LISTED = {
  'reduction': cases.entries(choices.REDUCTIONS),
  'link': cases.entries(choices.LINKS),
  'weighting': cases.entries(choices.WEIGHTINGS),
  'labels': ['hard', 'soft'],
  'nll': ['sum', 'mean', 'median'],
  'shift': ['running', 'none', 'late'],
}


def others(option, default):
  """Values that an option could have instead."""
  if option in LISTED:
    return [value for value in LISTED[option] if value != default]
  return [default + 1] if isinstance(default, int) else [2 * default + 0.05]


OTHERS = [
  (name, option, value)
  for name in table.LOSSES
  for option, default in table.options(name).items()
  for value in others(option, default)
]


@pytest.mark.parametrize('name, option, value', OTHERS)
def test_every_option_changes_the_loss_or_refuses(name, option, value):
  try:
    changed = outcome(name, **{option: value})
  except ValueError as error:
    assert option in str(error)
    assert str(value).partition(':')[0] in str(error)
    return
  assert np.abs(changed - outcome(name)).max() > 1e-5


def test_options_are_not_all_refused():
  """What each loss says it supports, it does; the law above allows less."""
  for name, loss in table.LOSSES.items():
    for kind in loss.reductions:
      number = ':0.5' if kind.startswith('ld') else ''
      assert np.isfinite(outcome(name, reduction=kind + number)).all()
    for weighting in loss.weightings:
      assert np.isfinite(outcome(name, weighting=weighting)).all()
  assert len(cases.LINKED) >= 11 and len(cases.SOFT) >= 20


@pytest.mark.parametrize('name', table.LOSSES)
def test_an_option_of_another_loss_is_refused(name):
  every = {option for other in table.LOSSES for option in table.options(other)}
  own = table.options(name)
  for option in every - set(own):
    with pytest.raises(ValueError, match=f"'{name}' takes .* not '{option}'"):
      table.make(name, **{option: 0.5})


@pytest.mark.parametrize('name', table.LOSSES)
def test_a_section_has_exactly_the_options_of_its_loss(name):
  full = table.options(name)
  (term,) = table.bind({name: full})
  assert term.name == name
  for option in full:
    short = {k: v for k, v in full.items() if k != option}
    with pytest.raises(ValueError, match=f"'{name}' takes"):
      table.bind({name: short})
  with pytest.raises(ValueError, match=f"'{name}' takes .*'extra'"):
    table.bind({name: full | {'extra': 1}})


@pytest.mark.parametrize(
  'name, options, says',
  [
    ('dpo', {'reduction': 'median'}, "unknown reduction 'median'"),
    ('dpo', {'reduction': 'sum:2'}, "'sum' takes no number"),
    ('dpo', {'reduction': 'ld'}, 'such as .ld:0.5'),
    ('dpo', {'reduction': 'ld:half'}, 'such as .ld:0.5'),
    ('dpo', {'reduction': 'ld:nan'}, 'ld'),
    ('dpo', {'reduction': 'ld:-1'}, 'ld'),
    ('dpo', {'link': 'backward_kl'}, "unknown link 'backward_kl'"),
    ('dpo', {'link': 'js:1'}, "'js' takes no number"),
    ('dpo', {'link': 'alpha'}, 'such as .alpha:0.5'),
    ('dpo', {'link': 'alpha:0'}, 'reverse_kl'),
    ('dpo', {'link': 'alpha:1.5'}, 'alpha'),
    ('dpo', {'link': 'js', 'reduction': 'mean'}, "reduction 'sum' or 'ld'"),
    ('dpo', {'weighting': 'wpo:2'}, "'wpo' takes no number"),
    ('dpo', {'labels': 'fuzzy'}, "'soft'"),
    ('dpo', {'weight': 0.0}, 'weight 0.0 must be above 0'),
    ('dpo', {'weight': -1.0}, 'weight -1.0 must be above 0'),
    ('dpo', {'weight': float('nan')}, 'weight nan must be above 0'),
    ('dpo', {'weight': float('inf')}, 'weight inf'),
    ('dpo', {'beta': float('nan')}, 'beta'),
    ('dpo', {'beta': -0.1}, 'beta'),
    ('ipo_sum', {'beta': 0.0}, 'beta'),
    ('robust', {'label_smoothing': 0.5}, 'label_smoothing 0.5'),
    ('cdpo', {'label_smoothing': 1.5}, 'label_smoothing 1.5'),
    ('aot', {'label_smoothing': -0.1}, 'label_smoothing -0.1'),
    ('exo', {'label_smoothing': 0.0}, 'label_smoothing 0.0'),
    ('exo', {'reward_temperature': -1.0}, 'reward_temperature'),
    ('nca', {'reward_temperature': -1.0}, 'reward_temperature'),
    ('discopop', {'tau': 0.0}, 'tau'),
    ('dr_dpo', {'beta_prime': 0.0}, 'beta_prime'),
    ('plackett_luce', {'top': -1}, 'top is -1'),
    ('soft', {'labels': 'soft'}, 'uses p itself'),
    ('likelihood_penalty', {'labels': 'soft'}, 'soft'),
  ],
  ids=str,
)
def test_values_without_a_meaning_are_refused(name, options, says):
  with pytest.raises(ValueError, match=says):
    table.make(name, **options)


def test_rankings_have_no_more_factors_than_responses():
  function = table.make('plackett_luce', top=3)
  assert np.isfinite(function(cases.draw(0, K=4))).all()
  with pytest.raises(ValueError, match='3 responses have factors 1 to 2'):
    function(cases.draw(0, K=3))


@pytest.mark.parametrize('name', ['infonca', 'nca', 'exo'])
def test_a_reward_temperature_needs_rewards(name):
  function = table.make(name, reward_temperature=0.5)
  with pytest.raises(ValueError, match='the data has no rewards'):
    function(cases.draw(0)._replace(rewards=None))


# --- Names and sums ---


def test_unknown_loss_names_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'ipo_sum'"):
    table.get('ipo_sun')


@pytest.mark.parametrize('name', table.INSTEAD)
def test_names_that_are_no_loss_say_what_to_use(name):
  for find in (table.get, table.options, table.section, table.make):
    with pytest.raises(ValueError, match=f"'{name}' is here "):
      find(name)
  # What it recommends exists.
  losses = re.findall(r"'(\w+)'", table.INSTEAD[name])
  assert set(losses) <= set(table.LOSSES)
  for option in re.findall(r'--config.loss.(\w+.\w+=\S+)', table.INSTEAD[name]):
    loss, _, change = option.partition('.')
    key, _, value = change.partition('=')
    assert table.make(loss, **{key: value})


@pytest.mark.parametrize('text', ['mpo+sft', 'dpo+', '+dpo', ''])
def test_sums_of_no_losses_are_refused(text):
  with pytest.raises(ValueError, match=r'name one loss between two \+'):
    table.section(text)


@pytest.mark.parametrize('name', table.ELSEWHERE)
def test_names_from_elsewhere_are_losses_of_ours(name):
  here, options = table.ELSEWHERE[name]
  assert name not in table.LOSSES
  assert table.section(name) == {here: table.options(here, **options)}
  table.bind(table.section(name))


def test_no_name_means_two_things():
  lists = [table.LOSSES, table.SUMS, table.ELSEWHERE, table.INSTEAD]
  names = [name for one in lists for name in one]
  assert len(names) == len(set(names))


@pytest.mark.parametrize('name', table.LOSSES)
def test_sections_are_the_defaults(name):
  assert table.section(name) == {name: table.options(name)}


def test_sections_are_sums():
  assert table.section('dpo+sft') == {
    'dpo': table.options('dpo'),
    'sft': table.options('sft'),
  }
  assert list(table.section('bco_pair+sigmoid')) == ['bco', 'dpo']
  with pytest.raises(ValueError, match="'dpo' stands twice"):
    table.section('dpo+sigmoid')
  with pytest.raises(ValueError, match='unknown loss'):
    table.section('dpo+nothing')
  with pytest.raises(ValueError, match='no loss is given'):
    table.bind({})


@pytest.mark.parametrize('name', table.SUMS)
def test_named_sums_bind(name):
  terms = table.bind(table.section(name))
  assert [term.name for term in terms] == list(table.SUMS[name])
  assert table.common_forms([term.name for term in terms])


def test_mpo_is_its_papers_sum():
  scores = cases.draw(0)
  terms = table.bind(table.section('mpo'))
  total = sum(term.weight * table.values(term, scores) for term in terms)
  expected = (
    0.8 * table.make('dpo', beta=0.1)(scores)
    + 0.2 * table.make('bco', beta=0.1, shift='none')(scores)
    + table.make('sft')(scores)
  )
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  assert [term.reduction for term in terms] == ['sum', 'sum', 'batch_mean']


def test_common_forms_are_those_of_every_loss():
  assert table.common_forms(['dpo']) == ['pairs']
  assert table.common_forms(['plackett_luce', 'sft']) == ['pairs', 'rankings']
  assert table.common_forms(['plackett_luce', 'dpo', 'sft']) == ['pairs']
  assert table.common_forms(['kto', 'bco']) == ['unpaired']
  with pytest.raises(ValueError, match="'kto' unpaired, 'dpo' pairs"):
    table.common_forms(['kto', 'dpo'])


# --- The choices themselves ---


def weights(how, lengths):
  """Token weights [B, K, T] of responses with these lengths [B, K]."""
  lengths = np.asarray(lengths)
  function = choices.choose(choices.REDUCTIONS, 'reduction', how)
  return np.asarray(
    jnp.broadcast_to(
      function(
        jnp.arange(5),
        lengths[..., None],
        lengths.min(-1)[:, None, None],
        lengths.mean(0)[None, :, None],
      ),
      (*lengths.shape, 5),
    )
  ) * (np.arange(5) < lengths[..., None])


@pytest.mark.parametrize(
  'how, longer, shorter',
  [
    ('sum', [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]),
    ('mean', [0.25, 0.25, 0.25, 0.25, 0], [0.5, 0.5, 0, 0, 0]),
    # The batch's longer ones have 3 tokens on average, the others 2.
    ('batch_mean', [1 / 3, 1 / 3, 1 / 3, 1 / 3, 0], [0.5, 0.5, 0, 0, 0]),
    ('ld:0.5', [1, 1, 0.5, 0.5, 0], [1, 1, 0, 0, 0]),
    ('ld:0', [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]),
    ('ld:1', [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]),
    ('ld_mean:0.5', [0.25, 0.25, 0.125, 0.125, 0], [0.5, 0.5, 0, 0, 0]),
    ('ld_mean:1', [0.25, 0.25, 0.25, 0.25, 0], [0.5, 0.5, 0, 0, 0]),
    ('last', [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]),
  ],
)
def test_reductions_weigh_tokens_as_they_say(how, longer, shorter):
  actual = weights(how, [[4, 2], [2, 2]])
  np.testing.assert_allclose(actual[0], [longer, shorter], rtol=1e-6)


def test_batch_mean_is_the_mean_over_all_tokens():
  lengths = np.array([[1, 1], [5, 2], [3, 4]])
  values = np.random.default_rng(0).standard_normal((3, 2, 5))
  real = np.arange(5) < lengths[..., None]
  mean = (weights('batch_mean', lengths) * values)[:, 0].sum(-1).mean()
  np.testing.assert_allclose(mean, values[:, 0][real[:, 0]].mean(), rtol=1e-6)


@pytest.mark.parametrize('link', cases.LINKS)
def test_links_rise_through_0(link):
  """f'(1) = 0; f''(1) = 1 but for JS, so that they agree near the reference."""
  function = choices.choose(choices.LINKS, 'link', link)
  with jax.enable_x64(True):
    rho = jnp.linspace(-5.0, 5.0, 101)
    score, slope = map(np.asarray, jax.vmap(jax.value_and_grad(function))(rho))
  np.testing.assert_allclose(score[50], 0.0, atol=1e-15)
  assert (slope > 0).all() and (np.diff(score) > 0).all()
  np.testing.assert_allclose(slope[50], 0.5 if link == 'js' else 1.0)


@pytest.mark.parametrize('a', [0.01, 0.5, 0.9])
def test_alpha_is_one_minus_trls_coefficient(a):
  rho = np.linspace(-5.0, 5.0, 11)
  function = choices.choose(choices.LINKS, 'link', f'alpha:{1 - a}')
  with jax.enable_x64(True):
    score = function(jnp.asarray(rho))
  np.testing.assert_allclose(
    score, np.expm1((a - 1) * rho) / (a - 1), rtol=1e-9, atol=1e-15
  )


@pytest.mark.parametrize('alpha', [1e-4, 1e-2, 1.0])
def test_alpha_links_keep_their_digits_in_float32(alpha):
  rho = np.array([-8.0, -0.5, 1e-3, 0.5, 8.0])
  function = choices.choose(choices.LINKS, 'link', f'alpha:{alpha}')
  np.testing.assert_allclose(
    function(jnp.asarray(rho, jnp.float32)),
    -np.expm1(-alpha * rho) / alpha,
    rtol=1e-5,
  )


def test_wpo_weighs_by_how_likely_the_policy_is_to_write_it():
  """Confidences are mean log p(token) - log sum_v p(v)^2 of each response."""

  def confidence(p, token):
    return np.log(p[token]) - np.log(np.sum(p**2))

  uniform = confidence(np.full(4, 0.25), 0)
  peaked = np.array([0.97, 0.01, 0.01, 0.01])
  rows = jnp.array(
    [
      [uniform, uniform],
      [confidence(peaked, 0), confidence(peaked, 0)],
      [confidence(peaked, 1), uniform],
    ]
  )
  wpo, clamped = choices.wpo(rows), choices.wpo_clamped(rows)
  np.testing.assert_allclose(wpo[0], 1.0, rtol=1e-6)
  np.testing.assert_allclose(wpo[1], 1.0, atol=0.1)  # the peak is the data
  np.testing.assert_allclose(wpo[2], 0.01 / 0.9412, rtol=1e-4)
  assert wpo[1] > 1.0
  np.testing.assert_allclose(clamped, np.minimum(wpo, 1.0), rtol=1e-6)
