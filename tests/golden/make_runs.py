"""Write the tiny training runs of others that replay_test.py follows.

Needs torch and TRL, which nothing else here does:
  pip install torch==2.13.0
  pip install trl==1.16.0 peft 'transformers==5.*'
  python tests/golden/make_runs.py
make_family.py, which needs the same, writes the runs of TRL's other losses.

Two runs are TRL's own DPOTrainer on text of made-up words. Nothing of it is
patched: a subclass notes down each batch and its loss, in whatever order the
trainer draws them. The third run is a plain PyTorch loop, written out below.

Each folder: `policy0/` and `ref/` are Hugging Face checkpoints with random
weights, policy = ref + noise. `batches.npz` holds for every step
`N/input_ids`, `N/attention_mask` and `N/completion_mask`, each [2B, T]: B
chosen sequences, then B rejected ones, right-padded. `metrics.json` has the
arguments, and loss, reward margin and unclipped gradient norm of every step,
before its update.
"""

import copy
import json
import pathlib
import tempfile

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

HERE = pathlib.Path(__file__).parent
EOS, PAD = 0, 1
STEPS = 10
B = 4
COMMON = dict(batch=B, grad_accum=1, steps=STEPS, label_smoothing=0.0)
# Clipping: TRL's runs at some steps and not at others, the last at every one.
RUNS = {
  'run_trl_sigmoid': dict(
    layers=2,
    d_model=32,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocab=97,
    tie=False,
    loss='sigmoid',
    beta=0.2,
    lr=2e-3,
    lr_warmup=0,
    optim='adamw_torch',
    max_grad_norm=7.0,
    perturb=0.03,
    seed=1,
  ),
  'run_trl_ipo': dict(
    layers=2,
    d_model=32,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocab=97,
    tie=True,
    loss='ipo',
    beta=0.4,
    lr=1e-3,
    lr_warmup=2,
    optim='adamw_torch',
    max_grad_norm=15.0,
    perturb=0.03,
    seed=2,
  ),
  'run_torch_rmsprop': dict(
    layers=3,
    d_model=24,
    heads=4,
    kv_heads=1,
    ffn=40,
    vocab=61,
    tie=False,
    loss='sigmoid',
    beta=0.5,
    lr=2e-4,
    lr_warmup=5,
    optim='rmsprop',
    max_grad_norm=1.0,
    perturb=0.03,
    seed=3,
  ),
}


def make_models(args):
  """Returns (policy, reference)."""
  torch.manual_seed(args['seed'])
  config = transformers.LlamaConfig(
    vocab_size=args['vocab'],
    hidden_size=args['d_model'],
    num_hidden_layers=args['layers'],
    num_attention_heads=args['heads'],
    num_key_value_heads=args['kv_heads'],
    intermediate_size=args['ffn'],
    max_position_embeddings=64,
    rope_parameters=dict(rope_type='default', rope_theta=500.0),
    tie_word_embeddings=args['tie'],
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=EOS,
    pad_token_id=PAD,
    attn_implementation='eager',
  )
  ref = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32
  )
  with torch.no_grad():
    for parameter in ref.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
    policy = copy.deepcopy(ref)
    for parameter in policy.parameters():
      parameter.add_(args['perturb'] * torch.randn_like(parameter))
  return policy, ref


def make_pairs(args, count):
  """Returns ragged (prompt, chosen, rejected), lists of ids."""
  random = np.random.default_rng(args['seed'])

  def draw(low, high):
    return random.integers(PAD + 1, args['vocab'], random.integers(low, high))

  return [
    tuple(x.tolist() for x in (draw(1, 12), draw(0, 15), draw(0, 15)))
    for _ in range(count)
  ]


def write_models(folder, policy, ref):
  for part, model in (('policy0', policy), ('ref', ref)):
    model.save_pretrained(folder / part)
    (folder / part / 'generation_config.json').unlink(missing_ok=True)
    (folder / part / 'model.safetensors').chmod(0o644)


def write_batches(folder, batches):
  np.savez_compressed(
    folder / 'batches.npz',
    **{
      f'{s}/{key}': array.astype(np.int32)
      for s, batch in enumerate(batches)
      for key, array in batch.items()
    },
  )


# --- TRL ---------------------------------------------------------------------


def make_tokenizer(vocab):
  """One token a word, 'w7' is 7; end and padding have their own."""
  names = {EOS: '<end>', PAD: '<pad>'}
  model = tokenizers.models.WordLevel(
    {names.get(i, f'w{i}'): i for i in range(vocab)}, unk_token='<pad>'
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token=names[EOS], pad_token=names[PAD]
  )


def text(ids):
  return ''.join(f' w{i}' for i in ids)


def make_rows(pairs):
  """Returns TRL's form of make_pairs."""
  return [
    dict(prompt=text(x).strip(), chosen=text(y), rejected=text(z))
    for x, y, z in pairs
  ]


def make_config(config_class, args, folder, **changes):
  """Returns a config of any of TRL's trainers: float32 and CPU, no extras."""
  return config_class(
    output_dir=folder,
    per_device_train_batch_size=args['batch'],
    max_steps=args['steps'],
    learning_rate=args['lr'],
    lr_scheduler_type='constant_with_warmup',
    warmup_steps=args['lr_warmup'],
    optim=args['optim'],
    weight_decay=0.0,
    max_grad_norm=args['max_grad_norm'],
    seed=args['seed'],
    logging_steps=1,
    save_strategy='no',
    report_to='none',
    disable_tqdm=True,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    **changes,
  )


def train(trainer):
  """Runs a trainer and returns its unclipped gradient norms."""
  trainer.train()
  return [
    log['grad_norm'] for log in trainer.state.log_history if 'grad_norm' in log
  ]


class Recorder(trl.DPOTrainer):
  """TRL's trainer, which also remembers what it saw."""

  def __init__(self, *args, **keywords):
    self.recorded = []
    super().__init__(*args, **keywords)

  def compute_loss(self, model, inputs, *args, **keywords):
    loss = super().compute_loss(model, inputs, *args, **keywords)
    margin = self._metrics['train']['rewards/margins'][-1]
    batch = {
      name: inputs[name].numpy().copy()
      for name in ('input_ids', 'attention_mask', 'completion_mask')
    }
    self.recorded.append((batch, loss.item(), margin))
    return loss


def run_trl(args, policy, ref, pairs):
  """Returns (batches, losses, margins, gradient norms)."""
  with tempfile.TemporaryDirectory() as folder:
    trainer = Recorder(
      model=policy,
      ref_model=ref,
      args=make_config(
        trl.DPOConfig, args, folder, loss_type=args['loss'], beta=args['beta']
      ),
      train_dataset=datasets.Dataset.from_list(make_rows(pairs)),
      processing_class=make_tokenizer(args['vocab']),
    )
    norms = train(trainer)
  return *zip(*trainer.recorded), norms


# --- Plain PyTorch -----------------------------------------------------------


def pad_batch(pairs):
  """Returns the arrays of one step; responses here do not end in EOS."""
  rows = [(x, y) for x, y, _ in pairs] + [(x, z) for x, _, z in pairs]
  T = max(len(x) + len(y) for x, y in rows)

  def stack(of_row, padding):
    return np.array(
      [of_row(x, y) + [padding] * (T - len(x) - len(y)) for x, y in rows]
    )

  return dict(
    input_ids=stack(lambda x, y: x + y, PAD),
    attention_mask=stack(lambda x, y: [1] * len(x + y), 0),
    completion_mask=stack(lambda x, y: [0] * len(x) + [1] * len(y), 0),
  )


def sequence_logps(model, batch):
  """Summed log-probs of the completions, [2B]."""
  ids, attend, scored = (
    torch.as_tensor(batch[name])
    for name in ('input_ids', 'attention_mask', 'completion_mask')
  )
  logits = model(input_ids=ids, attention_mask=attend).logits[:, :-1]
  token_logps = torch.gather(
    torch.log_softmax(logits, -1), -1, ids[:, 1:, None]
  )[..., 0]
  return (token_logps * scored[:, 1:]).sum(-1)


def run_torch(args, policy, ref, pairs):
  """Returns (batches, losses, margins, gradient norms)."""
  pairs = [(x, y or [PAD + 1], z or [PAD + 2]) for x, y, z in pairs]
  optimizer = torch.optim.RMSprop(
    policy.parameters(), lr=args['lr'], alpha=0.99, eps=1e-8
  )
  schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda s: min(1.0, s / args['lr_warmup'])
  )
  out = []
  for s in range(STEPS):
    batch = pad_batch([pairs[(s * B + i) % len(pairs)] for i in range(B)])
    with torch.no_grad():
      ref_logps = sequence_logps(ref, batch)
    rewards = args['beta'] * (sequence_logps(policy, batch) - ref_logps)
    margins = rewards[:B] - rewards[B:]
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      policy.parameters(), args['max_grad_norm']
    )
    optimizer.step()
    schedule.step()
    out.append((batch, loss.item(), margins.mean().item(), norm.item()))
  return zip(*out)


def main():
  torch.set_num_threads(1)
  for name, own in RUNS.items():
    folder = HERE / name
    args = COMMON | own
    policy, ref = make_models(args)
    write_models(folder, policy, ref)
    by_trl = args['optim'] != 'rmsprop'
    run = run_trl if by_trl else run_torch
    # Half as many pairs as are drawn: two epochs.
    pairs = make_pairs(args, STEPS * B // 2)
    batches, losses, margins, norms = run(args, policy, ref, pairs)
    assert len(losses) == len(norms) == STEPS
    assert args['max_grad_norm'] < max(norms), norms  # Clipping matters.
    write_batches(folder, batches)
    metrics = dict(
      impl='trl' if by_trl else 'torch',
      torch=torch.__version__,
      transformers=transformers.__version__,
      **({'trl': trl.__version__} if by_trl else {}),
      params=policy.num_parameters(),
      loss=losses,
      margin=margins,
      grad_norm=norms,
      args=args,
    )
    (folder / 'metrics.json').write_text(json.dumps(metrics, indent=1) + '\n')


if __name__ == '__main__':
  main()
