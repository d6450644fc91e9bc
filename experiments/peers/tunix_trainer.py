"""Tunix's DPOTrainer, on its Llama.

    python3 -m venv tunix && tunix/bin/pip install google-tunix

Its shapes are static, as it means them to be: prompts are padded on the left to
the longest of the run, responses on the right, so that it compiles once. Its
Llama rotates with theta 1e6 whatever its config says (0.1.7), so a checkpoint
with another theta is refused here.
"""

import json

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft.dpo import dpo_trainer

from experiments.peers import protocol


class Trainer(dpo_trainer.DPOTrainer):
  """Remembers the losses it logs."""

  losses = ()

  def _buffer_metrics(self, *args, loss, **keywords):
    self.losses = [*self.losses, loss]
    return super()._buffer_metrics(*args, loss=loss, **keywords)


def told(steps, inputs, trainer, per_step):
  """Yields micro-batches; begins and ends steps when the benchmark says so."""
  steps.begin()
  for number, one in enumerate(inputs, start=1):
    yield one
    if number % per_step == 0:  # asked for more: the step is under way
      jax.block_until_ready(nnx.state(trainer.model))
      steps.end(np.mean(trainer.losses))
      trainer.losses = ()


def load(folder, part, mesh):
  """Returns Tunix's model of a Hugging Face folder of a Llama."""
  config = json.loads((folder / part / 'config.json').read_text())
  theta = config.get('rope_theta') or config['rope_parameters']['rope_theta']
  if config['model_type'] != 'llama' or theta != 1e6:
    raise SystemExit('Tunix needs a Llama here, with rope_theta 1e6')
  return llama_params.create_model_from_safe_tensors(
    str(folder / part),
    llama.ModelConfig(
      num_layers=config['num_hidden_layers'],
      vocab_size=config['vocab_size'],
      embed_dim=config['hidden_size'],
      hidden_dim=config['intermediate_size'],
      num_heads=config['num_attention_heads'],
      head_dim=config['head_dim'],
      num_kv_heads=config['num_key_value_heads'],
      rope_theta=int(theta),
      norm_eps=config['rms_norm_eps'],
      weight_tying=config['tie_word_embeddings'],
    ),
    mesh,
    dtype=jax.numpy.float32,
  )


def padded(pairs, part, width, left):
  """Returns ids and mask, int32 [pairs, width]."""
  ids = np.zeros((len(pairs), width), np.int32)
  mask = np.zeros_like(ids)
  for row, attend, pair in zip(ids, mask, pairs):
    tokens = pair[part]
    where = slice(width - len(tokens), None) if left else slice(len(tokens))
    row[where], attend[where] = tokens, 1
  return {f'{part}_ids': ids, f'{part}_mask': mask}


def main():
  steps = protocol.Steps('google-tunix', 'jax', 'flax')
  folder, task, micro = protocol.arguments()
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(AxisType.Auto,) * 2)
  asked = task['steps'][: task['timed'] + 1]
  every = [pair for pairs in asked for pair in pairs]
  prompt = max(len(pair['prompt']) for pair in every)
  response = max(
    len(pair[part]) for pair in every for part in ('chosen', 'rejected')
  )
  inputs = [
    dpo_trainer.TrainingInput(
      **padded(pairs[i : i + micro], 'prompt', prompt, left=True),
      **padded(pairs[i : i + micro], 'chosen', response, left=False),
      **padded(pairs[i : i + micro], 'rejected', response, left=False),
    )
    for pairs in asked
    for i in range(0, len(pairs), micro)
  ]
  with mesh:
    trainer = Trainer(
      model=load(folder, 'policy', mesh),
      ref_model=load(folder, 'ref', mesh),
      optimizer=optax.chain(
        optax.clip_by_global_norm(task['clip_norm']),
        optax.adamw(task['learning_rate'], weight_decay=0.0),
      ),
      training_config=dpo_trainer.DPOTrainingConfig(
        beta=task['beta'],
        eval_every_n_steps=10**9,
        max_steps=len(asked),
        gradient_accumulation_steps=task['batch_size'] // micro,
        max_inflight_computations=1,
      ),
    )
    trainer.train(told(steps, inputs, trainer, task['batch_size'] // micro))


if __name__ == '__main__':
  main()
