"""Model + log-probabilities + loss = sums over the groups of a batch.

Sums and counts, never means: whoever divides decides over what (a step, a
whole evaluation), and a masked tail costs nothing.

Dimension key: R rows, S scored tokens per row, G groups per row, K responses
per group.
"""

import jax
import jax.numpy as jnp

from dpo_jax import logps
from dpo_jax import losses
from dpo_jax.models import transformer

REFERENCES = ('frozen', 'cached', 'none')


def make_scored(model_config):
  """Returns (params, batch) -> (hidden [R, S, D], unembedding [V, D]).

  Hidden states that predict the scored tokens; padding entries hold slot 0's.
  """
  model = transformer.Transformer(model_config)

  def scored(params, batch):
    hidden_RTD = model.apply(
      {'params': params},
      batch['tokens'],
      batch['positions'],
      batch['lo'],
      batch['hi'],
    )
    hidden_RSD = logps.gather_scored(hidden_RTD, batch['source'])
    return hidden_RSD, transformer.unembedding(params)

  return scored


def make_token_logps(model_config, *, chunk):
  """Returns (params, batch) -> float32 log-probs of scored tokens [R, S].

  Padding entries (`batch['slot']` is -1) hold numbers without a meaning.
  """
  scored = make_scored(model_config)

  def token_logps(params, batch):
    hidden_RSD, unembed_VD = scored(params, batch)
    return logps.token_logps(hidden_RSD, unembed_VD, batch['target'], chunk)

  return token_logps


def check_reference(loss_name, loss, reference):
  """A loss gets a reference if, and only if, it looks at one."""
  if reference not in REFERENCES:
    raise ValueError(
      f'reference.mode is {reference!r}; use one of {REFERENCES}'
    )
  if loss.reference and reference == 'none':
    raise ValueError(
      f'loss {loss_name!r} needs a reference; set reference.mode to'
      ' "frozen" or "cached"'
    )
  if not loss.reference and reference != 'none':
    raise ValueError(
      f'loss {loss_name!r} uses no reference; set reference.mode to "none"'
    )


def make_sums(token_logps, loss, loss_function, *, beta, reference):
  """Returns (params, ref_params, batch) -> dict of sums over real groups.

  Args:
    token_logps: of `make_token_logps`.
    loss: row of `losses.LOSSES`.
    loss_function: scores -> loss per group.
    beta: scale of the implicit rewards that are logged; None for losses
      without one.
    reference: 'frozen' computes reference log-probs from `ref_params`;
      'cached' reads `batch['ref_token_logps']` [R, S]; 'none' is zero.
  """
  K = loss.responses

  def sums(params, ref_params, batch):
    slot_RS, mask_RG = batch['slot'], batch['mask']
    R, G = mask_RG.shape

    def per_response(values_RS):
      sums_RQ = logps.sum_by_slot(values_RS, slot_RS, num_slots=G * K)
      return sums_RQ.reshape(R, G, K)

    policy_RGK = per_response(token_logps(params, batch))
    if reference == 'frozen':
      ref_RS = jax.lax.stop_gradient(token_logps(ref_params, batch))
      ref_RGK = per_response(ref_RS)
    elif reference == 'cached':
      ref_RGK = per_response(batch['ref_token_logps'])
    else:
      ref_RGK = jnp.zeros_like(policy_RGK)
    lengths_RGK = per_response(jnp.ones(slot_RS.shape))
    # Padding groups have no tokens: length 1 keeps divisions finite.
    scores = losses.Scores(
      policy_RGK, ref_RGK, jnp.maximum(lengths_RGK, 1.0), batch['p']
    )

    def total(values_RG):
      return jnp.sum(jnp.where(mask_RG, values_RG, 0.0))

    out = {
      'loss': total(batch['weight'] * loss_function(scores)),
      'groups': jnp.sum(mask_RG),
      'scored_tokens': jnp.sum(slot_RS >= 0),
      'logps/chosen': total(policy_RGK[..., 0]),
    }
    if K == 2:
      rewards_RGK = losses.implicit_rewards(scores, beta=beta)
      chosen, rejected = rewards_RGK[..., 0], rewards_RGK[..., 1]
      out |= {
        'logps/rejected': total(policy_RGK[..., 1]),
        'rewards/chosen': total(chosen),
        'rewards/rejected': total(rejected),
        'rewards/margin': total(chosen - rejected),
        'rewards/accuracy': total(chosen > rejected),
      }
    else:
      out['nll_tokens'] = -total(policy_RGK.sum(-1))
    return out

  return sums
