"""Preference training on one data set.

    dpo-jax train --workdir=runs/hh \
        --config=configs/preference.py:data=hh,loss=dpo,model=smollm2-135m

Arguments behind the colon, with what they may be:
  data: hh, tldr, jsonl        loss: a name of docs/losses.md, or a sum of
                               them, such as dpo+sft
  model: common.MODELS         optim: rmsprop (the DPO paper's), adamw
  adapter: none, lora, peft
  reference: frozen, cached, ema, adapter_off, none; auto: frozen, or
    adapter_off for a new adapter, if the loss has one
  debug: two steps of a tiny random model, seconds on a CPU
"""

from configs import common


def get_config(arg=''):
  return common.training(
    common.parse(
      arg,
      data='hh',
      loss='dpo',
      model='smollm2-135m',
      adapter='none',
      reference='auto',
      optim='rmsprop',
      debug=False,
    )
  )
