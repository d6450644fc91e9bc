"""Supervised fine-tuning; on preference data it is Preferred-FT.

    dpo-jax train --workdir=runs/sft \
        --config=configs/sft.py:data=hh,model=smollm2-135m

On pairs the chosen responses are the targets. Arguments as in
`preference.py`.
"""

from configs import common


def get_config(arg=''):
  return common.training(
    common.parse(
      arg,
      data='hh',
      loss='sft',
      model='smollm2-135m',
      adapter='none',
      reference='auto',
      optim='adamw',
      debug=False,
    )
  )
