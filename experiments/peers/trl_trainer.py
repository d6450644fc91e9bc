"""TRL's DPOTrainer.

    python3 -m venv trl && trl/bin/pip install torch trl

Its defaults (a batch is padded to its own longest sequence), without activation
checkpointing, which costs time to save memory, unless `--remat=full` asks us
for it too, and without `padding_free`, which TRL 1.16 ignores. Tokens are given
to it as they are.
"""

import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl

from experiments.peers import protocol


class Trainer(trl.DPOTrainer):
  """Takes tokens and order as given; tells the benchmark when a step ends."""

  def __init__(self, *args, steps, **keywords):
    self.steps, self.losses = steps, []
    super().__init__(*args, **keywords)

  def _prepare_dataset(self, dataset, *_):
    return dataset

  def _get_train_sampler(self, _=None):
    return torch.utils.data.SequentialSampler(self.train_dataset)

  def compute_loss(self, *args, **keywords):
    loss = super().compute_loss(*args, **keywords)
    self.losses.append(loss.item())
    return loss


class Told(transformers.TrainerCallback):
  """Begins and ends steps when the benchmark says so."""

  def __init__(self, trainer):
    self.trainer = trainer

  def on_train_begin(self, *_, **__):
    self.trainer.steps.begin()

  def on_step_end(self, *_, **__):
    losses = self.trainer.losses
    self.trainer.steps.end(sum(losses) / len(losses))
    losses.clear()


def make_tokenizer():
  """Returns a tokenizer that TRL asks for padding and end, and nothing else."""
  model = tokenizers.models.WordLevel({'<end>': 0}, unk_token='<end>')
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(model),
    eos_token='<end>',
    pad_token='<end>',
  )


def main():
  torch.set_num_threads(1)
  folder, task, micro = protocol.arguments()
  cpu = task['platform'] == 'cpu'
  memory = protocol.peak_memory if cpu else torch.cuda.max_memory_allocated
  steps = protocol.Steps('trl', 'transformers', 'torch', memory=memory)
  policy, ref = (
    transformers.AutoModelForCausalLM.from_pretrained(
      folder / part, dtype=torch.float32, attn_implementation='sdpa'
    )
    for part in ('policy', 'ref')
  )
  dataset = datasets.Dataset.from_list(
    [
      {f'{part}_ids': pair[part] for part in ('prompt', 'chosen', 'rejected')}
      for pairs in task['steps']
      for pair in pairs
    ]
  )
  with tempfile.TemporaryDirectory() as output:
    trainer = Trainer(
      steps=steps,
      model=policy,
      ref_model=ref,
      args=trl.DPOConfig(
        output_dir=output,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=task['batch_size'] // micro,
        max_steps=task['timed'] + 1,
        learning_rate=task['learning_rate'],
        lr_scheduler_type='constant',
        optim='adamw_torch',
        weight_decay=0.0,
        max_grad_norm=task['clip_norm'],
        beta=task['beta'],
        max_length=None,
        gradient_checkpointing=task['remat'] == 'full',
        bf16=task['dtype'] == 'bfloat16',
        use_cpu=cpu,
        logging_strategy='no',
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
      ),
      train_dataset=dataset,
      processing_class=make_tokenizer(),
    )
    trainer.add_callback(Told(trainer))
    trainer.train()


if __name__ == '__main__':
  main()
