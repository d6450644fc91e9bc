import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import optim

GRADS = [3.0, -1.0, 0.5, 2.0]


def run(name, *, clip_norm=0.0, lr=0.1, **changes):
  keywords = optim.OPTIMIZERS[name] | changes
  tx = optim.make(
    name,
    optax.constant_schedule(lr),
    clip_norm=clip_norm,
    keywords=keywords,
  )
  x = jnp.array([1.0])
  state, path = tx.init(x), []
  for g in GRADS:
    updates, state = tx.update(jnp.array([g]), state, x)
    x = optax.apply_updates(x, updates)
    path.append(float(x[0]))
  return path


def test_rmsprop_is_that_of_pytorch():
  # torch.optim.RMSprop: v = .99 v + .01 g^2; x -= lr g / (sqrt(v) + eps)
  x, v, path = 1.0, 0.0, []
  for g in GRADS:
    v = 0.99 * v + 0.01 * g * g
    x -= 0.1 * g / (np.sqrt(v) + 1e-8)
    path.append(x)
  np.testing.assert_allclose(run('rmsprop'), path, rtol=1e-5, atol=1e-6)


def test_adamw_is_that_of_pytorch():
  x, m, v, path = 1.0, 0.0, 0.0, []
  for t, g in enumerate(GRADS, start=1):
    x -= 0.1 * 0.01 * x
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g * g
    x -= 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    path.append(x)
  np.testing.assert_allclose(run('adamw', weight_decay=0.01), path, rtol=1e-4)


def test_clipping_scales_long_gradients_only():
  tx = optim.make(
    'rmsprop',
    optax.constant_schedule(1.0),
    clip_norm=5.0,
    keywords=optim.OPTIMIZERS['rmsprop'],
  )
  state = tx.init(jnp.zeros(2))
  long, _ = tx.update(jnp.array([6.0, 8.0]), state)
  short, _ = tx.update(jnp.array([3.0, 4.0]), state)
  np.testing.assert_allclose(long, short, rtol=1e-6)
  half, _ = tx.update(jnp.array([0.3, 0.4]), state)
  np.testing.assert_allclose(half, short, rtol=1e-4)  # scale-free, not clipped


def rate(step, **changes):
  settings = dict(
    lr=2.0,
    schedule='constant',
    warmup_steps=4,
    warmup_init=0.0,
    num_steps=14,
  )
  return float(optim.learning_rate(**(settings | changes))(step))


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({}, [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
    # The DPO authors': (step + 1) / (warm-up + 1).
    ({'warmup_init': 0.2}, [0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0]),
    ({'warmup_steps': 0}, [2.0] * 7),
  ],
)
def test_warmup(changes, expected):
  np.testing.assert_allclose(
    [rate(step, **changes) for step in range(7)], expected, rtol=1e-6
  )


@pytest.mark.parametrize(
  'schedule, middle', [('linear', 1.0), ('cosine', 1.0), ('constant', 2.0)]
)
def test_decay_ends_with_the_run(schedule, middle):
  assert rate(4, schedule=schedule) == 2.0
  np.testing.assert_allclose(rate(9, schedule=schedule), middle, rtol=1e-6)
  end = 2.0 if schedule == 'constant' else 0.0
  np.testing.assert_allclose(rate(14, schedule=schedule), end, atol=1e-6)


def test_bad_names_and_keywords_are_refused():
  with pytest.raises(ValueError, match='use one of'):
    rate(0, schedule='step')
  with pytest.raises(ValueError, match="did you mean 'adamw'"):
    run_unknown('adam')
  with pytest.raises(ValueError, match="optimizer 'adamw' takes"):
    run('adamw', momentum=0.9)


def run_unknown(name):
  optim.make(name, optax.constant_schedule(1.0), clip_norm=0, keywords={})
