"""Responses to other prompts, for estimates that need mismatched ones.

KTO (arXiv:2402.01306) measures how far the policy is from the reference by
responses put to prompts that they do not belong to: (x_i, y_j), x_j not x_i.
"""

import dataclasses

import numpy as np

from dpo_jax.data import examples


def mismatched(groups: list[examples.Group]) -> list[examples.Group]:
  """Gives each single response a second one, of a group of another prompt.

  The own response stays first, so that rows hold (see `rows`)

      reversed mismatched | prompt | own response

  and the estimate costs no second prompt. Who is whose partner depends on the
  groups and their order alone, and not on which stand side by side, since the
  halves of a pair do. Every response is a partner exactly once, unless one
  prompt has more than half of all groups: then its groups take turns with the
  responses of the others. Reward and cost of a partner are 0, where the groups
  have any: they are known of the own response only.
  """
  if not groups:
    return []
  if any(len(group.responses) != 1 for group in groups):
    raise ValueError(
      'mismatched responses are for groups of one response; read the data in'
      " the form 'unpaired'"
    )
  by_prompt = {}
  # Always the same seed: partners are part of the data, not of a run.
  for n in np.random.default_rng(0).permutation(len(groups)):
    by_prompt.setdefault(groups[n].prompt.tobytes(), []).append(n)
  if len(by_prompt) == 1:
    raise ValueError(
      f'all {len(groups)} groups have the same prompt, so there is no'
      ' mismatched response; add examples of other prompts (to a held-out split'
      ' by a larger data.held_out) or use a loss that needs none'
    )
  most = max(by_prompt, key=lambda prompt: len(by_prompt[prompt]))
  first = by_prompt.pop(most)
  order = [*first, *(n for members in by_prompt.values() for n in members)]
  # A prompt's groups stand together, so a step as long as the longest such
  # stretch leaves every one of them, and round the end it comes back to none.
  step, others = len(first), len(order) - len(first)
  made = list(groups)
  for place, n in enumerate(order):
    if step <= others:
      partner = order[(place + step) % len(order)]
    elif place < step:
      partner = order[step + place % others]
    else:
      partner = order[place - step]
    group = groups[n]
    made[n] = dataclasses.replace(
      group,
      responses=(*group.responses, *groups[partner].responses),
      rewards=None if group.rewards is None else (*group.rewards, 0.0),
      costs=None if group.costs is None else (*group.costs, 0.0),
    )
  return made
