"""Write the tiny runs of TRL's many losses that replay tests follow.

Needs what make_runs.py needs, and takes 15 seconds:
  python tests/golden/make_family.py

Nothing of TRL is patched: subclasses note down what passes through.

`run_trl_family/` has one pair of checkpoints, `policy0/` and `ref/`, and one
`batches.npz` in make_runs.py's layout, for all its runs: each starts from the
same weights and draws the same batches in the same order, which is asserted.
`metrics.json` has `args`, what the runs have in common, and for every run the
`args` that differ, and loss, reward margin and unclipped gradient norm of
every step, before its update. Names and values of `args` are those of TRL's
configs, apart from those that make_runs.py uses too; runs of other trainers
than DPOTrainer use none of the common ones that only DPOTrainer knows.

`run_trl_kto/` has the runs of TRL's KTO trainer on sequences with labels,
from the same checkpoints. `N/input_ids`, `N/attention_mask` and
`N/completion_mask` are [B, T]; the same with a prefix `KL_` are the mismatched
sequences that TRL built; `N/label` is [B], 1 for desirable.
"""

import copy
import dataclasses
import json
import tempfile

import datasets
import make_runs
import numpy as np
import torch
import transformers
import trl
from trl.experimental import cpo
from trl.experimental import orpo

COMMON = dict(
  batch=6,
  grad_accum=1,
  steps=8,
  layers=2,
  d_model=32,
  heads=4,
  kv_heads=2,
  ffn=32,
  vocab=97,
  tie=True,
  perturb=0.02,
  seed=4,
  lr=1e-3,
  lr_warmup=0,
  optim='adamw_torch',
  max_grad_norm=5.0,
)
# TRL's defaults, but for beta and ref_model_sync_steps.
DPO = dict(
  trainer='DPOTrainer',
  loss_type='sigmoid',
  loss_weights=None,
  beta=0.3,
  label_smoothing=0.0,
  ld_alpha=None,
  f_divergence_type='reverse_kl',
  f_alpha_divergence_coef=0.5,
  use_weighting=False,
  discopop_tau=0.05,
  sync_ref_model=False,
  ref_model_mixup_alpha=0.6,
  ref_model_sync_steps=3,
)
RUNS = {
  'sigmoid': dict(),
  'hinge': dict(loss_type='hinge'),
  'exo_pair': dict(loss_type='exo_pair', label_smoothing=1e-3),
  'nca_pair': dict(loss_type='nca_pair'),
  'robust': dict(loss_type='robust', label_smoothing=0.1),
  'bco_pair': dict(loss_type='bco_pair'),
  'sppo_hard': dict(loss_type='sppo_hard', beta=0.5),
  'aot': dict(loss_type='aot'),
  'aot_smoothed': dict(loss_type='aot', label_smoothing=0.1),
  'aot_unpaired': dict(loss_type='aot_unpaired'),
  'apo_zero': dict(loss_type='apo_zero', max_grad_norm=2.5),
  'apo_down': dict(loss_type='apo_down', max_grad_norm=1.75),
  'discopop': dict(loss_type='discopop'),
  'sigmoid_norm': dict(loss_type='sigmoid_norm', beta=2.0),
  'sft': dict(loss_type='sft'),
  'ld': dict(ld_alpha=0.5),
  'wpo': dict(use_weighting=True),
  # A low beta: with more, exp() makes these follow the last bit of a float.
  'forward_kl': dict(f_divergence_type='forward_kl', beta=0.1),
  'js_divergence': dict(f_divergence_type='js_divergence'),
  'alpha_divergence': dict(f_divergence_type='alpha_divergence', beta=0.15),
  'hinge_forward_kl': dict(loss_type='hinge', f_divergence_type='forward_kl'),
  'mpo': dict(
    loss_type=['sigmoid', 'bco_pair', 'sft'], loss_weights=[0.8, 0.2, 1.0]
  ),
  'tr_dpo': dict(sync_ref_model=True),
  'simpo': dict(
    trainer='CPOTrainer',
    loss_type='simpo',
    beta=2.0,
    simpo_gamma=0.5,
    cpo_alpha=0.0,
  ),
  'cpo': dict(
    trainer='CPOTrainer',
    loss_type='sigmoid',
    beta=0.1,
    cpo_alpha=1.0,
  ),
  'orpo': dict(trainer='ORPOTrainer', beta=1.0),
}
KTO = dict(
  trainer='KTOTrainer',
  beta=0.3,
  desirable_weight=1.0,
  undesirable_weight=1.3,
  max_grad_norm=2.0,
)
KTO_RUNS = {
  'kto': dict(loss_type='kto'),
  'apo_zero_unpaired': dict(loss_type='apo_zero_unpaired'),
}

# What TRL does that its names do not say, read from its source. S: log-sigmoid.
NOTES = {
  'margin': (
    'beta * (chosen - rejected log-ratio), mean over pairs, whatever the loss;'
    ' after ld_alpha, before any f-divergence, length or sorting.'
  ),
  'aot, aot_unpaired': (
    'Sorted over the micro-batch, here the batch. aot sorts chosen - rejected'
    ' of the policy and of the reference, each by itself; aot_unpaired sorts'
    ' the log-ratios of chosen and of rejected.'
  ),
  'sigmoid_norm': (
    'Each log-ratio over the number of its completion tokens, EOS too.'
  ),
  'sft': (
    'Mean of -log p over all chosen completion tokens of the micro-batch (EOS'
    ' too, prompt not), not a mean over sequences; so in mpo.'
  ),
  'ld': (
    'Policy and reference: sum over the first min(n_c, n_r) completion tokens'
    ' + ld_alpha * sum over the others.'
  ),
  'wpo': (
    'Each loss times w_c * w_r, w = exp(mean over completion tokens of (log p'
    ' of the token - log sum over the vocabulary of p^2)), of the policy of'
    ' now, without gradient, not clamped, not normalised over the batch.'
  ),
  'tr_dpo': (
    'Whenever the number of optimizer steps made is a multiple of'
    ' ref_model_sync_steps: ref <- a * policy + (1 - a) * ref, policy after'
    ' that step. new_reference_at: steps, from 0, that find a new reference.'
  ),
  'simpo': (
    'No reference, mean log-probs of completions. -S(beta * (c - r) - gamma);'
    ' margin: beta * (c - r).'
  ),
  'cpo': (
    'No reference, summed log-probs. mean of -S(beta * (c - r)) + cpo_alpha *'
    ' NLL, NLL as in sft; margin: beta * (c - r).'
  ),
  'orpo': (
    'No reference, mean log-probs of completions. NLL - beta * mean of S(c - r'
    ' - log(1 - exp(c)) + log(1 - exp(r))). NLL is a mean over all tokens of'
    ' the chosen sequences of the micro-batch but the first of each: of the'
    ' prompt too. margin: beta * (c - r).'
  ),
}
KTO_NOTES = {
  'kto': (
    'x: log-ratio of a completion. Desirable: desirable_weight * (1 -'
    ' sigmoid(beta * (x - z))); undesirable: undesirable_weight * (1 -'
    ' sigmoid(beta * (z - x))); mean over the B sequences. kl is z = max(0,'
    ' mean over the micro-batch of the log-ratios of the mismatched'
    ' completions), no gradient. Mismatched: prompt i with completion i - 1 of'
    ' the micro-batch, the first with the last.'
  ),
  'apo_zero_unpaired': 'As kto with z = 0; builds no mismatched sequences.',
  'margin': 'Mean beta * x of the desirable - that of the undesirable; no z.',
}


class Recorder:
  """What any of TRL's trainers remembers of its steps when mixed into it."""

  def __init__(self, *args, **keywords):
    self.batches = []
    self.values = []
    self.synced = []
    self._last_ref = None
    super().__init__(*args, **keywords)

  def compute_loss(self, model, inputs, *args, **keywords):
    self._watch_reference(model)
    loss = super().compute_loss(model, inputs, *args, **keywords)
    own = getattr(self, '_metrics', None) or self._stored_metrics
    values = dict(loss=loss.item(), margin=own['train']['rewards/margins'][-1])
    if 'kl' in own['train']:
      values['kl'] = own['train']['kl'][-1]
    self.values.append(values)
    self.batches.append(
      {k: v.numpy().astype(np.int32) for k, v in self._arrays(inputs).items()}
    )
    return loss

  def _arrays(self, inputs):
    if 'chosen_input_ids' not in inputs:
      return inputs
    both = self.concatenated_inputs(inputs, padding_value=make_runs.PAD)
    return dict(
      input_ids=both['concatenated_input_ids'],
      attention_mask=both['concatenated_attention_mask'],
      completion_mask=both['concatenated_labels'] != -100,
    )

  def _watch_reference(self, model):
    """Notes steps that find a new reference: a mix with the policy of now."""
    if getattr(self, 'ref_model', None) is None:
      return
    ref = flatten(self.ref_model)
    if self._last_ref is not None and not torch.equal(ref, self._last_ref):
      self.synced.append(len(self.values))
      a = self.args.ref_model_mixup_alpha
      mixed = (1 - a) * self._last_ref + a * flatten(model)
      torch.testing.assert_close(ref, mixed, rtol=0, atol=1e-6)
    self._last_ref = ref


def flatten(model):
  return torch.cat([x.detach().flatten() for x in model.parameters()])


class DPOTrainer(Recorder, trl.DPOTrainer):
  pass


class KTOTrainer(Recorder, trl.KTOTrainer):
  pass


class CPOTrainer(Recorder, cpo.CPOTrainer):
  pass


class ORPOTrainer(Recorder, orpo.ORPOTrainer):
  pass


# Trainer, its config, and whether it takes a reference; those that do not have
# an older collator, which wants all columns.
TRAINERS = {
  'DPOTrainer': (DPOTrainer, trl.DPOConfig, True),
  'KTOTrainer': (KTOTrainer, trl.KTOConfig, True),
  'CPOTrainer': (CPOTrainer, cpo.CPOConfig, False),
  'ORPOTrainer': (ORPOTrainer, orpo.ORPOConfig, False),
}


def run(args, policy, ref, rows):
  """Trains copies of the models; returns (batches, metrics)."""
  args = dict(args)
  trainer_class, config_class, refers = TRAINERS[args.pop('trainer')]
  names = {f.name for f in dataclasses.fields(config_class)} - set(COMMON)
  with tempfile.TemporaryDirectory() as folder:
    trainer = trainer_class(
      model=copy.deepcopy(policy),
      **(dict(ref_model=copy.deepcopy(ref)) if refers else {}),
      args=make_runs.make_config(
        config_class,
        args,
        folder,
        train_sampling_strategy='sequential',
        remove_unused_columns=refers,
        **{k: v for k, v in args.items() if k in names},
      ),
      train_dataset=datasets.Dataset.from_list(rows),
      processing_class=make_runs.make_tokenizer(args['vocab']),
    )
    norms = make_runs.train(trainer)
  metrics = {
    key: [values[key] for values in trainer.values] for key in trainer.values[0]
  }
  metrics['grad_norm'] = norms
  if trainer.synced:
    metrics['new_reference_at'] = trainer.synced
  return trainer.batches, metrics


def run_all(runs, common, policy, ref, rows):
  """Returns (the batches of the first run, metrics by name of run)."""
  first, out = None, {}
  for name, own in runs.items():
    args = common | own
    batches, metrics = run(args, policy, ref, rows)
    first = first or batches
    assert len(batches) == len(metrics['grad_norm']) == args['steps']
    for expected, batch in zip(first, batches, strict=True):
      assert {'input_ids', 'attention_mask', 'completion_mask'} <= set(batch)
      for key, array in batch.items():
        np.testing.assert_array_equal(array, expected[key])
    assert args['max_grad_norm'] < max(metrics['grad_norm'])  # It matters.
    assert ('new_reference_at' in metrics) == (name == 'tr_dpo')
    out[name] = dict(args=own) | metrics
  return first, out


def write(folder, batches, metrics):
  folder.mkdir(exist_ok=True)
  make_runs.write_batches(folder, batches)
  versions = dict(
    torch=torch.__version__,
    transformers=transformers.__version__,
    trl=trl.__version__,
  )
  text = json.dumps(dict(versions=versions) | metrics, indent=1)
  (folder / 'metrics.json').write_text(text + '\n')


@torch.no_grad()
def draw(model, prompt, length, temperature):
  """Returns a continuation of so many tokens."""
  ids = torch.tensor([prompt])
  for _ in range(length):
    logits = model(ids).logits[:, -1] / temperature
    logits[:, [make_runs.EOS, make_runs.PAD]] = -torch.inf
    ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
  return ids[0, len(prompt) :].tolist()


def make_pairs(args, models):
  """Returns what make_runs.make_pairs does, responses by the models.

  Likely tokens bring out what random ones hide: weights of WPO about 1, and
  ORPO's odds that differ from probabilities.
  """
  # Half as many as are drawn: two epochs.
  pairs = make_runs.make_pairs(args, args['steps'] * args['batch'] // 2)
  torch.manual_seed(args['seed'])
  return [
    (
      x,
      draw(models[i % 2], x, len(y), 0.4),
      draw(models[i // 2 % 2], x, len(z), 0.8),
    )
    for i, (x, y, z) in enumerate(pairs)
  ]


def label(rows, args):
  """Returns KTO's form of pairs: of each the one or the other response."""
  random = np.random.default_rng(args['seed'])
  out = []
  for row in rows:
    good = bool(random.random() < 2 / 3)
    completion = row['chosen' if good else 'rejected']
    out.append(dict(prompt=row['prompt'], completion=completion, label=good))
  return out


def main():
  torch.set_num_threads(1)
  policy, ref = make_runs.make_models(COMMON)
  folder = make_runs.HERE / 'run_trl_family'
  make_runs.write_models(folder, policy, ref)
  rows = make_runs.make_rows(make_pairs(COMMON, (policy, ref)))
  batches, runs = run_all(RUNS, COMMON | DPO, policy, ref, rows)
  write(folder, batches, dict(args=COMMON | DPO, notes=NOTES, runs=runs))

  labelled = label(rows, COMMON)
  batches, runs = run_all(KTO_RUNS, COMMON | KTO, policy, ref, labelled)
  args = COMMON | KTO | dict(models='run_trl_family')
  folder = make_runs.HERE / 'run_trl_kto'
  write(folder, batches, dict(args=args, notes=KTO_NOTES, runs=runs))


if __name__ == '__main__':
  main()
