"""Model + log-probabilities + losses = sums over the groups of a batch.

Sums and counts, never means: whoever divides decides over what (a step, a
whole evaluation), and a masked tail costs nothing.

Dimension key: R rows, S scored tokens per row, G groups per row, K responses
per group, Q = G * K responses per row.
"""

import jax
import jax.numpy as jnp

from dpo_jax import logps
from dpo_jax import names
from dpo_jax.losses import scoring
from dpo_jax.losses import table
from dpo_jax.models import heads
from dpo_jax.models import transformer

# Mode -> the other keys of a config's reference section.
REFERENCES = {
  'frozen': (),  # a second copy of the weights
  'cached': ('cache_dir',),  # log-probs computed once
  'ema': ('alpha', 'every'),  # a copy that follows the policy: TR-DPO
  'adapter_off': (),  # the weights that an adapter is put on
  'none': (),
}


def make_scored(model_config):
  """Returns (variables, batch) -> (hidden [R, S, D], unembedding [V, D]).

  Hidden states that predict the scored tokens; padding entries hold slot 0's.
  `variables` are of `lora.variables`: parameters and perhaps an adapter.
  """
  hidden = _make_hidden(model_config)

  def scored(variables, batch):
    hidden_RSD = logps.gather_scored(hidden(variables, batch), batch['source'])
    return hidden_RSD, transformer.unembedding(variables['params'])

  return scored


def _make_hidden(model_config):
  """Returns (variables, batch) -> hidden states of all slots [R, T, D]."""
  model = transformer.Transformer(model_config)

  def hidden(variables, batch):
    inputs = (batch[name] for name in ('tokens', 'positions', 'lo', 'hi'))
    return model.apply(variables, *inputs)

  return hidden


def make_head_values(model_config):
  """Returns (variables, batch) -> the head's float32 number at every scored
  token [R, S], read where the token itself stands.

  At a response's last token that is the score of the whole response.
  """
  hidden = _make_hidden(model_config)

  def head_values(variables, batch):
    hidden_RSD = logps.gather_scored(hidden(variables, batch), batch['at'])
    return heads.apply(variables['params']['head'], hidden_RSD)

  return head_values


def make_token_logps(model_config, *, chunk):
  """Returns (variables, batch) -> float32 log-probs of scored tokens [R, S].

  Padding entries (`batch['slot']` is -1) hold numbers without a meaning.
  """
  scored = make_scored(model_config)

  def token_logps(variables, batch):
    hidden_RSD, unembed_VD = scored(variables, batch)
    return logps.token_logps(
      hidden_RSD, unembed_VD, targets(batch), chunk, cap=model_config.logit_cap
    )

  return token_logps


def targets(batch):
  """Returns the scored tokens as `logps` wants them, -1 for padding: [R, S]."""
  return jnp.where(batch['slot'] < 0, -1, batch['target'])


def check_reference(terms, reference):
  """Refuses a reference section that does not fit itself or the losses.

  The losses get a reference if, and only if, one of them looks at it.
  """
  mode = reference['mode']
  keys = names.look_up(REFERENCES, 'reference.mode', mode)
  if set(reference) != {'mode', *keys}:
    raise ValueError(
      f'reference.mode {mode!r} takes {", ".join(keys) or "no other key"}, got'
      f' {sorted(set(reference) - {"mode"})}; choose it behind the colon of'
      f' --config (reference={mode}), which brings its keys'
    )
  if mode == 'ema' and (
    not 0.0 <= reference['alpha'] <= 1.0 or reference['every'] < 1
  ):
    raise ValueError(
      'reference.alpha must lie in [0, 1] and reference.every be 1 or more;'
      f' got {reference["alpha"]} and {reference["every"]}'
    )
  needy = [term.name for term in terms if term.loss.reference]
  if needy and mode == 'none':
    raise ValueError(
      f'loss {needy[0]!r} needs a reference; choose reference=frozen,'
      ' reference=cached or another behind the colon of --config'
    )
  if not needy and mode != 'none':
    raise ValueError(
      f'loss {terms[0].name!r} uses no reference; choose reference=none behind'
      ' the colon of --config'
    )
  for term in terms:
    if 'kls' in term.needs and mode == 'cached':
      raise ValueError(
        f"loss {term.name!r} needs the reference's whole distribution, which"
        ' is not cached; choose reference=frozen or reference=ema'
      )


def first_memory(terms):
  """Returns what the losses remember before the first step: {name: dict}."""
  return {term.name: term.memory for term in terms if term.memory}


def make_sums(
  model_config, terms, *, chunk, reference, responses, form, rewards
):
  """Returns (variables, ref_variables, batch, memory) -> (totals, memory).

  totals is {name: (sum over real groups, count to divide by)}; `loss` is the
  weighted sum of the terms. Logged rewards are those of `table.of_rewards`: its
  beta times log pi - log pi_ref in sums over tokens (DPO, eq. 5), without a
  reference beta times the reduced log pi; a loss without a beta counts as 1.
  Where the losses are of a reward model, its head's numbers stand in the place
  of log pi, and no log-probs are computed.

  Args:
    model_config: of policy and reference.
    terms: of `table.bind`.
    chunk: see `logps.token_logps`.
    reference: of `REFERENCES`; 'cached' reads `batch['ref_token_logps']`
      [R, S], 'none' is zero, the others compute from `ref_variables`.
    responses: K.
    form: of the data, which decides what is logged.
    rewards: whether the data has rewards.
  """
  K, cap = responses, model_config.logit_cap
  scored = make_scored(model_config)
  head_values = make_head_values(model_config)
  head = table.of_head(term.name for term in terms)
  needs = {field for term in terms for field in term.needs}
  partnered = any(term.loss.mismatched for term in terms)
  of_rewards = table.of_rewards(terms)
  weighted = any(term.weighting != 'none' for term in terms)

  def sums(variables, ref_variables, batch, memory):
    slot_RS, mask_RG = batch['slot'], batch['mask']
    R, G = mask_RG.shape

    def per_response(values_RS):
      sums_RQ = logps.sum_by_slot(values_RS, slot_RS, num_slots=G * K)
      return sums_RQ.reshape(R, G, K)

    def per_token(values_RGK):
      values_RQ = jnp.broadcast_to(values_RGK, (R, G, K)).reshape(R, G * K)
      return jnp.take_along_axis(values_RQ, jnp.maximum(slot_RS, 0), axis=1)

    # ------------------------- log-probs, or head's numbers, of all tokens ----
    if head:
      policy_RS = head_values(variables, batch)
    else:
      hidden, target_RS = scored(variables, batch), targets(batch)
      if weighted:
        policy_RS, collisions_RS = logps.token_logps_and_collisions(
          *hidden, target_RS, chunk, cap=cap
        )
      else:
        policy_RS = logps.token_logps(*hidden, target_RS, chunk, cap=cap)
    ref_RS = jnp.zeros_like(policy_RS)
    if reference == 'cached':
      ref_RS = batch['ref_token_logps']
    elif reference != 'none':
      ref_hidden = jax.lax.stop_gradient(scored(ref_variables, batch))
      ref_RS = logps.token_logps(*ref_hidden, target_RS, chunk, cap=cap)

    # --------------------------------------------------- scores of groups ----
    # Padding groups have no tokens: length 1 keeps divisions finite.
    lengths_RGK = jnp.maximum(per_response(jnp.ones(slot_RS.shape)), 1.0)
    mean_lengths_K = jnp.stack(
      [scoring.masked_mean(lengths_RGK[..., k], mask_RG) for k in range(K)]
    )
    place = {
      'index': logps.index_in_slot(slot_RS, num_slots=G * K),
      'length': per_token(lengths_RGK),
      'shortest': per_token(lengths_RGK.min(-1, keepdims=True)),
      'mean_length': per_token(mean_lengths_K),
    }
    scores = scoring.Scores(
      policy=per_response(policy_RS),
      ref=per_response(ref_RS),
      lengths=lengths_RGK,
      p=batch['p'],
      mask=mask_RG,
      rewards=batch['rewards'] if rewards else None,
      costs=batch['costs'],
    )
    if 'kls' in needs:
      kls_RS = logps.token_kls(*ref_hidden, *hidden, chunk=chunk, cap=cap)
      scores = scores._replace(kls=per_response(kls_RS))
    if 'complements' in needs:
      complements_RS = scoring.log_complement(policy_RS)
      scores = scores._replace(complements=per_response(complements_RS))
    if weighted:
      excess_RGK = per_response(policy_RS - collisions_RS)
      scores = scores._replace(confidences=excess_RGK / lengths_RGK)

    # -------------------------------------------------------------- losses ----
    groups = jnp.sum(mask_RG)
    out = {'loss': (0.0, groups)}
    memory = dict(memory)
    for term in terms:
      weights_RS = term.reduce(**place)
      reduced = scores._replace(
        policy=per_response(weights_RS * policy_RS),
        ref=per_response(weights_RS * ref_RS),
        memory=memory.get(term.name),
      )
      if partnered and not term.loss.mismatched:
        reduced = scoring.take_responses(reduced, slice(1))
      if term is of_rewards:
        rewarded = reduced
      losses_RG = batch['weight'] * table.values(term, reduced)
      value = jnp.sum(jnp.where(mask_RG, losses_RG, 0.0))
      out['loss'] = (out['loss'][0] + term.weight * value, groups)
      if len(terms) > 1:
        out[f'loss/{term.name}'] = (value, groups)
      if term.memory:
        memory[term.name] = term.remember(reduced)

    # ------------------------------------------------------------- metrics ----
    implicit_RGK = scoring.implicit_rewards(
      rewarded if reference == 'none' else scores, beta=of_rewards.reward_scale
    )
    if head:
      mean_RG = jnp.mean(implicit_RGK, -1)
      out['rewards/mean'] = _total(mean_RG, mask_RG)
      return out | compared(implicit_RGK, mask_RG), memory
    return out | measured(form, scores, implicit_RGK), memory

  return sums


def _total(values_RG, mask_RG):
  return jnp.sum(jnp.where(mask_RG, values_RG, 0.0)), jnp.sum(mask_RG)


def compared(rewards_RGK, mask_RG):
  """What is logged of the rewards of the best and the worst response."""
  chosen_RG, rejected_RG = rewards_RGK[..., 0], rewards_RGK[..., -1]
  return {
    'rewards/chosen': _total(chosen_RG, mask_RG),
    'rewards/rejected': _total(rejected_RG, mask_RG),
    'rewards/margin': _total(chosen_RG - rejected_RG, mask_RG),
    'rewards/accuracy': _total(chosen_RG > rejected_RG, mask_RG),
  }


def measured(form, scores, rewards_RGK):
  """What is logged besides the loss: {name: (sum, count)}.

  Args:
    form: of the data.
    scores: in sums over tokens.
    rewards_RGK: implicit rewards.
  """
  mask_RG, logps_RGK = scores.mask, scores.policy
  K = logps_RGK.shape[-1]

  def mean(values_RG, where_RG=mask_RG):
    return _total(values_RG, where_RG)

  if form == 'unpaired':
    desirable_RG = scores.p > 0.5
    out = {}
    for name, where_RG in [
      ('desirable', mask_RG & desirable_RG),
      ('undesirable', mask_RG & ~desirable_RG),
    ]:
      out[f'logps/{name}'] = mean(logps_RGK[..., 0], where_RG)
      out[f'rewards/{name}'] = mean(rewards_RGK[..., 0], where_RG)
    if K == 2:
      out['kl/mismatched'] = mean(scoring.log_ratio(scores)[..., 1])
    return out
  out = {'logps/chosen': mean(logps_RGK[..., 0])}
  if K == 1:
    tokens = jnp.sum(jnp.where(mask_RG, scores.lengths[..., 0], 0.0))
    out['token_nll'] = -out['logps/chosen'][0], tokens
    return out
  out['logps/rejected'] = mean(logps_RGK[..., -1])
  out |= compared(rewards_RGK, mask_RG)
  if scores.kls is not None:
    out['kl/chosen'] = mean(scores.kls[..., 0])
    out['kl/rejected'] = mean(scores.kls[..., -1])
  return out
