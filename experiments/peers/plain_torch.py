"""DPO as it is written by hand in PyTorch, with padding per micro-batch.

    python3 -m venv torch && torch/bin/pip install torch transformers

Chosen and rejected sequences are one right-padded batch as wide as its longest
sequence, of models of transformers with its default attention (SDPA); logits
of all positions, cross entropy of PyTorch's own. A step of more pairs than
`--micro` adds up the gradients of several batches.
"""

import torch
import transformers

from experiments.peers import protocol


def load(folder, part):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder / part, dtype=torch.float32
  )


def batch(pairs):
  """Returns (ids, attention mask, labels), [2 pairs, longest]."""
  rows = [
    (pair['prompt'], pair[side])
    for side in ('chosen', 'rejected')
    for pair in pairs
  ]
  longest = max(len(prompt) + len(response) for prompt, response in rows)
  ids = torch.zeros(len(rows), longest, dtype=torch.long)
  attend = torch.zeros_like(ids)
  labels = torch.full_like(ids, -100)
  for n, (prompt, response) in enumerate(rows):
    size = len(prompt) + len(response)
    ids[n, :size] = torch.tensor(prompt + response)
    attend[n, :size] = 1
    labels[n, len(prompt) : size] = ids[n, len(prompt) : size]
  return ids, attend, labels


def sequence_logps(model, ids, attend, labels):
  """Summed log-probs of the responses: (of chosen ones, of rejected ones)."""
  logits = model(input_ids=ids, attention_mask=attend, use_cache=False).logits
  losses = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1),
    labels[:, 1:].flatten(),
    ignore_index=-100,
    reduction='none',
  )
  return -losses.view(len(ids), -1).sum(-1).view(2, -1)


def main():
  torch.set_num_threads(1)
  steps = protocol.Steps('torch', 'transformers')
  folder, task, micro = protocol.arguments()
  policy, ref = load(folder, 'policy'), load(folder, 'ref')
  policy.train()
  ref.eval()
  optimizer = torch.optim.AdamW(
    policy.parameters(), lr=task['learning_rate'], weight_decay=0.0
  )
  steps.begin()
  for pairs in task['steps'][: task['timed'] + 1]:
    total = 0.0
    for start in range(0, len(pairs), micro):
      inputs = batch(pairs[start : start + micro])
      with torch.no_grad():
        ref_logps = sequence_logps(ref, *inputs)
      chosen, rejected = sequence_logps(policy, *inputs) - ref_logps
      margins = task['beta'] * (chosen - rejected)
      loss = -torch.nn.functional.logsigmoid(margins).sum() / len(pairs)
      loss.backward()
      total += loss.item()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), task['clip_norm'])
    optimizer.step()
    optimizer.zero_grad()
    steps.end(total)


if __name__ == '__main__':
  main()
