"""`generate` of transformers as a side of `bench_sampling`.

    python3 -m venv torch && torch/bin/pip install torch transformers

Prompts are padded on the left; its default cache and attention (SDPA).
"""

import json
import os

import torch
import transformers

from experiments.peers import protocol


def main():
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  steps = protocol.Steps('torch', 'transformers')
  folder, task, _ = protocol.arguments()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / 'policy', dtype=getattr(torch, task['dtype'])
  ).to(device)
  model.eval()
  prompts, new = task['prompts'], task['max_new_tokens']
  longest = max(map(len, prompts))
  ids = torch.zeros(len(prompts), longest, dtype=torch.long)
  mask = torch.zeros_like(ids)
  for n, prompt in enumerate(prompts):
    ids[n, longest - len(prompt) :] = torch.tensor(prompt)
    mask[n, longest - len(prompt) :] = 1
  ids, mask = ids.to(device), mask.to(device)

  def generate(**how):
    with torch.inference_mode():
      out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new,
        eos_token_id=-1,  # none ends
        pad_token_id=0,
        **how,
      )
    return out[:, longest:].cpu()

  steps.begin()
  greedy = generate(do_sample=False)
  (folder / 'transformers_generate.json').write_text(
    json.dumps(greedy.tolist())
  )
  steps.end(greedy.numel())
  while True:
    tokens = generate(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    steps.end(tokens.numel())


if __name__ == '__main__':
  main()
