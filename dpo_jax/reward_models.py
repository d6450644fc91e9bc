"""Rewards that are trained models, and rewards by any name.

A reward model is a run of `train` with a loss of `losses/comparisons`. Training
fixes only differences of its scores, so what is read here is shifted: the mean
score of the run's held-out responses, as its evaluation at that checkpoint
wrote it to metrics.jsonl, is taken off, and E[r] = 0 there.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import checkpoint
from dpo_jax import evaluators
from dpo_jax import logps
from dpo_jax import metrics
from dpo_jax import objectives
from dpo_jax import policies
from dpo_jax import processes
from dpo_jax import rewards
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import workdirs
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.losses import choices
from dpo_jax.losses import table
from dpo_jax.models import heads
from dpo_jax.models import transformer

# What evaluations call the score that becomes 0.
_MEAN = 'heldout/rewards/mean'
_SHORTEST = 16  # tokens of the smallest shape that is compiled


def check(name):
  """Refuses a name that no reward has, as far as the name alone tells."""
  kind, _, rest = str(name).partition(':')
  if kind == 'model':
    _parted(rest)
  else:
    rewards.check(name)


def _parted(text):
  """Returns (workdir, which checkpoint) of WORKDIR or WORKDIR@WHICH.

  An @ may be of the path as well: of a folder on the way, or of one that is
  there.
  """
  if not text:
    raise ValueError("reward 'model:': write model:WORKDIR of a reward model")
  workdir, at, which = text.rpartition('@')
  if workdir and checkpoint.can_mean(which):
    return workdir, which
  if at and os.sep not in which and not os.path.isdir(text):
    raise ValueError(
      f'reward model:{text}: {which!r} is no checkpoint; write'
      f' model:WORKDIR@WHICH with {checkpoint.NEWEST}, {checkpoint.BEST} or a'
      ' step, also behind a WORKDIR that ends in an @ and a name'
    )
  return text, checkpoint.NEWEST


def get(name, *, mesh=None):
  """Returns the reward of any name, see `rewards`; the one way to it.

  `model:WORKDIR@WHICH` is a checkpoint of a run: newest, best or a step.
  `mesh` is of the devices that a learned one goes to; None: all, side by side.
  """
  kind, _, rest = str(name).partition(':')
  if kind == 'model':
    workdir, which = _parted(rest)
    return load(workdir, which=which, mesh=mesh)
  return rewards.get(name)


def titles(judges):
  """Returns {title: name} of the names of several rewards.

  A title is what an evaluation calls the judge's column: the name, or what its
  file, folder, function or rule is called.
  """
  found = {}
  for name in judges:
    kind, _, rest = str(name).partition(':')
    path = pathlib.PurePath(rest or kind)
    title = path.suffix[1:] if kind == 'python' else path.stem
    if title in found or title in evaluators.COLUMNS:
      raise ValueError(
        f'judge {name!r} would be called {title!r}, as another column of'
        ' samples is; give it another file name'
      )
    found[title] = name
  return found


def load(workdir, *, which='newest', mesh=None):
  """Opens the reward model of a run.

  Args:
    workdir: of the run.
    which: checkpoint, see `checkpoint`.
    mesh: of the devices it goes to; None: all, side by side.
  """
  saved = workdirs.read_config(workdir)
  if not saved or not table.of_head(saved.get('loss', {})):
    raise ValueError(
      f'{workdir!r} is no run of a reward model; train one with'
      ' `dpo-jax train --config=configs/preference.py:loss=bradley_terry`'
    )
  config = settings.Settings(saved)
  if mesh is None:
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  policy = policies.open_policy(
    config, mesh, workdir=workdir, which=which, head=0.0
  )
  return RewardModel(
    policy,
    policies.templated(policy.tokenizer, config.data.chat_template),
    mesh,
    max_prompt_tokens=config.data.max_prompt_tokens,
    max_response_tokens=config.data.max_response_tokens,
    row_length=config.data.row_length,
    batch_size=config.eval.batch_size,
    offset=_mean_score(workdir, policy.step),
  )


def _mean_score(workdir, step):
  """Returns what the evaluation at a checkpoint's step has written."""
  found = [
    record[_MEAN]
    for record in metrics.read(workdir)
    if record['step'] == step and _MEAN in record
  ]
  if not found:
    raise ValueError(
      f'{workdir!r} has no {_MEAN} of step {step}, which is taken off its'
      ' scores; let checkpoint.every be a multiple of eval.every and hold some'
      ' data out'
    )
  return found[-1]


class RewardModel(rewards.EndAware):
  """A reward: (prompts, responses) -> float64 [N], of texts or of tokens."""

  def __init__(
    self,
    policy,
    tokenizer,
    mesh,
    *,
    max_prompt_tokens,
    max_response_tokens,
    row_length,
    batch_size,
    offset,
  ):
    """Takes a `policies.Policy` with a head; sizes are those of its run.

    `offset` is taken off every score.
    """
    self._variables = _stored(policy)
    self._tokenizer = tokenizer
    self._mesh = mesh
    self._limits = max_prompt_tokens, max_response_tokens
    self._row_length = row_length
    self._batch_size = batch_size
    self.offset = offset
    self._step = jax.jit(
      functools.partial(_last, objectives.make_head_values(policy.config)),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(self, prompts, responses, ended=None):
    """Scores texts (a prompt may be messages) as the run's data was scored.

    What has ended has an EOS, what was cut has none, and what is longer than
    the run's limits is cut as its data was.
    """
    most_prompt, most_response = self._limits
    return self.score_tokens(
      examples.encode_prompts(prompts, self._tokenizer, most_prompt),
      examples.encode_responses(
        responses, self._tokenizer, most_response, ended=ended
      ),
    )

  def score_tokens(self, prompts, responses):
    """Scores int32 arrays as they are, at the last token of each response."""
    if not len(responses):
      return np.zeros(0)
    groups = [
      examples.Group(prompt, (response,), 1.0, 1.0, '')
      for prompt, response in zip(prompts, responses, strict=True)
    ]
    # Powers of two: texts of any length meet few compiled programs.
    most_prompt, most_response = (
      max(_SHORTEST, 1 << (max(map(len, texts)) - 1).bit_length())
      for texts in (prompts, responses)
    )
    row_groups = max(1, self._row_length // (most_prompt + most_response))
    plan = batches.uniform_plan(
      groups,
      max_prompt=most_prompt,
      max_response=most_response,
      row_groups=row_groups,
      batch_rows=-(-self._batch_size // row_groups),
      multiple=sharding.row_shards(self._mesh),
    )
    out = np.zeros(len(groups))
    with sharding.use(self._mesh):
      for number in range(plan.num_steps):
        processes.poll()
        batch = evaluators.put_batch(plan, number, self._mesh)
        scores_RG = np.asarray(self._step(self._variables, batch))
        groups_RG = plan.batch(number)['group']
        out[groups_RG[groups_RG >= 0]] = scores_RG[groups_RG >= 0]
    return out - self.offset


def _stored(policy):
  """Returns the variables, as they are computed with: no number changes."""
  variables = policy.variables(policy.trained)
  params = variables['params']
  trunk = transformer.cast(heads.without(params), policy.config.dtype)
  return variables | {'params': trunk | {'head': params['head']}}


def _last(head_values, variables, batch):
  """The head's numbers at the last tokens of responses, [R, G]."""
  slot_RS, G = batch['slot'], batch['mask'].shape[1]
  lengths_RG = logps.sum_by_slot(jnp.ones(slot_RS.shape), slot_RS, num_slots=G)
  weights_RS = choices.last_token(
    logps.index_in_slot(slot_RS, num_slots=G),
    jnp.take_along_axis(lengths_RG, jnp.maximum(slot_RS, 0), axis=1),
    None,
    None,
  )
  values_RS = head_values(variables, batch)
  return logps.sum_by_slot(weights_RS * values_RS, slot_RS, num_slots=G)
