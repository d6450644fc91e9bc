"""The scalar head of a decoder: one number from a hidden state.

A reward model reads it at the last token of a response (`objectives`), a value
function at every token (`ppo`). Its parameters stand beside the decoder's own,
under the key 'head', so one tree is trained, sharded and saved; the decoder
does not look at them.

Parameters:
  head/kernel [D]   head/bias []        both float32, whatever is computed in

Dimension key: D model, X any.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def init(key, width, *, scale):
  """Returns a new head of `width` D: the kernel is normal, the bias is zero.

  The kernel has the standard deviation scale / sqrt(D + 1). Scale 1 is that of
  reward models (Stiennon et al. 2020, arXiv:2009.01325; Huang et al. 2024,
  arXiv:2403.17031), 0 is a value function that knows nothing yet.
  """
  deviation = scale * (width + 1) ** -0.5
  kernel = deviation * jax.random.normal(key, (width,), jnp.float32)
  return {'kernel': kernel, 'bias': jnp.zeros((), jnp.float32)}


def boxed(head):
  """Boxes a head with its logical axes, for `sharding.parameter_shardings`."""
  return {
    'kernel': nn.LogicallyPartitioned(head['kernel'], ('embed',)),
    'bias': nn.LogicallyPartitioned(head['bias'], ()),
  }


def apply(head, hidden_XD):
  """Returns the head's number of each hidden state, float32 [X]."""
  product_X = jnp.einsum(
    '...d,d->...',
    hidden_XD.astype(jnp.float32),
    head['kernel'].astype(jnp.float32),
    precision='highest',
  )
  return product_X + head['bias'].astype(jnp.float32)


def without(params):
  """Returns a parameter tree without its head, if it has one."""
  return {name: tree for name, tree in params.items() if name != 'head'}
