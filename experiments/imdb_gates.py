"""Controlled sentiment: criteria that can fail, as functions of measurements.

They are those of figure 2 and figure 4 of arXiv:2305.18290:

  A1   80 % of PPO's checkpoints after the first (learned reward) have less
       reward at more KL than some checkpoint of DPO; DPO's area under reward
       against KL, 0 to 12 nats (`frontiers.area`), is larger with p < .05, by
       resampling prompts; the best checkpoint of unlikelihood and that of
       Preferred-FT, if it gains on the SFT model, is below DPO's envelope at
       its KL (how many of all are above it is told). Void where PPO's runs do
       not end .2 above the SFT model, on the mean
  A2   the best of N rises up to N = 64; from 64 to 128 it gains less than a
       quarter of what it gains from 1 to 4, which is two doublings, so that
       this alone is no plateau; its KL is within the bound, which holds of our
       estimate whatever the samples are
  A3   the best DPO wins at least as often as the best PPO, and loses less from
       its best temperature to temperature 1
  A15  the learned reward ranks 90 % of held-out pairs as the classifier does

A gate is a dict: 'verdict' ('met', 'not met', 'void', 'not asked', or
'incomplete' where a part of it is), 'text' with the numbers, and 'parts'.
`Evaluated` and its checkpoints are those of `imdb_results`.
"""

import itertools

import numpy as np

from dpo_jax import frontiers
from dpo_jax import judges
from dpo_jax import reweighting

LIMIT = 12.0  # nats, of the areas
CURVE = 3.0  # nats up to which self-normalized weights are drawn
COMPETENT = 0.2  # least rise of PPO's reward over the SFT model's
BELOW = ('unlikelihood', 'preferred_ft')  # that are to stay below DPO


def gate(parts, text, *, void=False, complete=True, **numbers):
  """Returns what a gate says, see above.

  Args:
    parts: {what is asked: whether it holds}.
    text: the numbers.
    void: whether they are no answer.
    complete: whether all that is to be asked is there.
    numbers: that the dict has besides.
  """
  if void:
    verdict = 'void'
  elif not all(parts.values()):
    verdict = 'not met'
  else:
    verdict = 'met' if complete else 'incomplete'
  return {'verdict': verdict, 'text': text, 'parts': parts} | numbers


def checkpoints(runs, *, first=True):
  """Returns the checkpoints of runs, the `first` of each with them or not."""
  return [
    checkpoint
    for x in runs
    for point, checkpoint in zip(x.points, x.checkpoints)
    if first or point['step']
  ]


def a1(found, *, sft, resamples=10_000):
  """Compares DPO's frontier with that of PPO on the learned reward.

  Args:
    found: {method: finished runs, `Evaluated`}, with dpo and ppo.
    sft: mean reward of the SFT model, where all begin.
    resamples: of the prompts.
  """
  dpo, ppo = (checkpoints(found[method]) for method in ('dpo', 'ppo'))
  later = frontiers.points(checkpoints(found['ppo'], first=False))
  kls, values = frontiers.points(dpo)
  corners = frontiers.envelope(kls, values)
  beaten = frontiers.dominated(later, (kls, values))
  unreached = int(np.sum(later[0] <= kls[kls > kls.min()].min(initial=np.inf)))
  under = later[1] < frontiers.best_within(later[0], corners)
  areas = frontiers.compare_areas(dpo, ppo, limit=LIMIT, resamples=resamples)
  ends = [x.points[-1]['reward'] for x in found['ppo']]
  rise = float(np.mean(ends)) - sft
  others = {
    method: below(
      checkpoints(found[method], first=False), dpo, sft=sft, resamples=resamples
    )
    for method in BELOW
    if found.get(method)
  }
  parts = {
    'dominated': float(beaten.mean()) >= 0.8,
    'area': areas['difference'] >= 0.0 and areas['p'] < 0.05,
  } | {method: x['below'] for method, x in others.items()}
  text = (
    f'{len(found["dpo"])} DPO and {len(found["ppo"])} PPO runs:'
    f' {int(beaten.sum())} of {len(beaten)} PPO checkpoints'
    f' ({100 * beaten.mean():.0f} %) are dominated ({unreached} have less KL'
    f' than any checkpoint of DPO), {int(under.sum())} are below its envelope;'
    f' area DPO {areas["ours"]:.3f}, PPO {areas["theirs"]:.3f}, difference'
    f' {areas["difference"]:+.3f} [{areas["low"]:+.3f}, {areas["high"]:+.3f}],'
    f' p = {areas["p"]:.4f}; PPO ends {rise:+.3f} over SFT (competent from'
    f' {COMPETENT:+.1f})'
  )
  for method, x in others.items():
    text += f'; {method} at best {x["reward"]:.3f} at {x["kl"]:.2f} nats'
    if x['gains']:
      lead = x['lead']
      text += f', DPO there {x["dpo"]:.3f} ({lead["difference"]:+.3f}'
      text += f' [{lead["low"]:+.3f}, {lead["high"]:+.3f}])'
    else:
      text += ': no gain on SFT'
    text += f', {x["above"]} of {x["checkpoints"]} checkpoints are above DPO'
  return gate(
    parts,
    text,
    void=rise < COMPETENT,
    complete=len(others) == len(BELOW),
    dominated=float(beaten.mean()),
    under=float(under.mean()),
    areas=areas,
    rise=rise,
    others=others,
  )


def below(measured, dpo, *, sft, resamples):
  """Asks whether the best of some checkpoints is below DPO's envelope.

  One that gains nothing on the SFT model's reward is. `above` counts those that
  gain and are above the envelope, `lead` is of `frontiers.lead`.
  """
  kls, rewards = frontiers.points(measured)
  corners = frontiers.envelope(*frontiers.points(dpo))
  there = frontiers.best_within(kls, corners)
  best = int(np.argmax(rewards))
  gains = bool(rewards[best] > sft)
  return {
    'kl': float(kls[best]),
    'reward': float(rewards[best]),
    'dpo': float(there[best]),
    'lead': frontiers.lead(dpo, measured[best], resamples=resamples),
    'above': int(np.sum((rewards > there) & (rewards > sft))),
    'checkpoints': len(measured),
    'gains': gains,
    'below': not gains or bool(rewards[best] < there[best]),
  }


def best_of_curve(learned_NS, rewards_NS, numbers):
  """Returns {'n', 'reward', 'reward_se', 'gain_se', 'kl', 'bound'} of each n.

  What is the best is the learned reward's choice. gain_se: of what it gains on
  the n before it, over prompts.
  """
  rewards_NS = np.asarray(rewards_NS, float)
  out, before = [], 0.0
  for n in numbers:
    by_prompt = (reweighting.best_of(n, learned_NS) * rewards_NS).sum(1)
    out.append(
      {
        'n': n,
        'reward': float(by_prompt.mean()),
        'reward_se': judges.standard_error(by_prompt),
        'gain_se': judges.standard_error(by_prompt - before),
        'kl': float(reweighting.best_of_kl(n, learned_NS).mean()),
        'bound': reweighting.best_of_kl_bound(n),
      }
    )
    before = by_prompt
  return out


def a2(curve):
  """Asks whether best of N rises, and then hardly any more.

  `curve` is of `best_of_curve`. Scales without 1, 4, 64 and 128 have no answer.
  """
  values = {x['n']: x['reward'] for x in curve}
  bounded = all(x['kl'] <= x['bound'] + 1e-9 for x in curve)
  told = ', '.join(f'{n}: {x:.3f}' for n, x in values.items())
  if not {1, 4, 64, 128} <= values.keys():
    return {'verdict': 'not asked', 'text': f'reward of the best of N {told}'}
  doublings = ', '.join(
    f'{a} to {b} {(values[b] - values[a]) / np.log2(b / a):+.4f}'
    for a, b in itertools.pairwise(sorted(values))
  )
  upto = [values[n] for n in sorted(values) if n <= 64]
  late, early = values[128] - values[64], values[4] - values[1]
  (late_se,) = (x['gain_se'] for x in curve if x['n'] == 128)
  parts = {
    'rises': all(a < b for a, b in itertools.pairwise(upto)),
    'plateau': late < 0.25 * early,
    'bound': bounded,
  }
  return gate(
    parts,
    f'reward of the best of N {told}; from 64 to 128 {late:+.4f} ±'
    f' {late_se:.4f}, from 1 to 4 {early:+.4f}; a doubling: {doublings}; KL'
    f' {"within" if bounded else "beyond"} the bound',
  )


def a3(rows):
  """Compares win rates over temperatures; `rows` are of temperature.json."""
  rates, errors = (
    {
      policy: {
        row['temperature']: row[name] for row in rows if row['policy'] == policy
      }
      for policy in ('dpo', 'ppo')
    }
    for name in ('win_rate', 'win_rate_se')
  )
  at = {policy: max(x, key=x.get) for policy, x in rates.items()}
  best = {policy: rates[policy][at[policy]] for policy in rates}
  drop = {policy: best[policy] - rates[policy][1.0] for policy in rates}
  parts = {
    'wins': best['dpo'] >= best['ppo'],
    'robust': drop['dpo'] < drop['ppo'],
  }
  told = ', '.join(
    f'{policy.upper()} {best[policy]:.3f} ± {errors[policy][at[policy]]:.3f}'
    f' at temperature {at[policy]:g}'
    for policy in rates
  )
  repeated = ', '.join(
    f'{row["policy"]} {row["distinct_2"]:.3f}'
    for row in rows
    if row['temperature'] == 0.0
  )
  return gate(
    parts,
    f'best win rate {told}; lost from there to temperature 1: DPO'
    f' {drop["dpo"]:.3f}, PPO {drop["ppo"]:.3f}; distinct-2 at temperature 0:'
    f' {repeated}',
  )


def a15(records, step):
  """Asks how many held-out pairs the learned reward ranks rightly.

  Args:
    records: metrics of its training.
    step: of the checkpoint that is the learned reward; it was chosen by these
      very pairs.
  """
  name = 'heldout/rewards/accuracy'
  (found,) = (r for r in records if name in r and r['step'] == step)
  return gate(
    {'accuracy': found[name] >= 0.9},
    f'accuracy {found[name]:.3f} ± {found[f"{name}_se"]:.3f} on'
    f' {found["heldout/groups"]:.0f} held-out pairs (as if those of a prompt'
    f' were independent), at step {step}, which they chose',
  )


def tilted_curve(rewards_NS):
  """Returns (KLs, rewards) of Eq. 4's policies, made of samples by weights.

  Up to `CURVE` nats: beyond, a few of a prompt's samples have all the weight.
  Before that it is an estimate from below: the best of so many samples is not
  the best text there is.
  """
  kls, values = [], []
  for beta in np.geomspace(100.0, 0.001, 200):
    weights_NS = reweighting.tilted(rewards_NS, beta)
    kl = reweighting.kl(weights_NS).mean()
    if kl > CURVE:
      break
    kls.append(float(kl))
    values.append(float((weights_NS * rewards_NS).sum(1).mean()))
  return kls, values
