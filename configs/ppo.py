"""PPO on rewards of whole responses, with the settings of published runs.

    dpo-jax ppo --config=configs/ppo.py --workdir=runs/ppo
    dpo-jax ppo --config=configs/ppo.py:preset=gt_ours,data=imdb --workdir=...

Arguments: preset, model, data, kl, adapter, debug. `data=prompts`, the usual
one, is a file of prompts or the openings of reviews that ship with us; other
names are data sets whose prompts are taken.
"""

from configs import common

# Published settings; where a source is silent, the row says that we chose. The
# reward here is one that needs nothing; the paper's, a classifier of sentiment,
# is --config.reward.name=sentiment:FILE (log odds, as TRL took them) or
# sentiment_probability:FILE. rollout: samples a step. batch_size: samples an
# update.
PRESETS = {
  # TRL in May 2023, which the DPO paper (arXiv:2305.18290) calls PPO-GT (TRL):
  # the ground-truth reward as it is. Its updates of one sample each need
  # mesh.data=1; on more devices raise batch_size.
  'gt_trl': dict(
    reward='vader',
    rollout=256,
    batch_size=1,
    epochs=4,
    lr=1.41e-5,
    schedule='constant',
    clip_norm=0.0,
    kl='adaptive',
    coef=0.2,
    value_coef=0.1,
    normalize='none',
    whiten_rewards=False,
  ),
  # The DPO paper's own version (appendix C.1): 1024 samples a step, normalized
  # rewards, kl.target 3, 6, 9 or 12. The rest it tuned and does not tell; here
  # it is as in `lm_human`, with four minibatches, a constant rate and clipped
  # gradients, which we chose.
  'gt_ours': dict(
    reward='vader',
    rollout=1024,
    batch_size=256,
    epochs=4,
    lr=1e-5,
    schedule='constant',
    clip_norm=1.0,
    kl='adaptive',
    coef=0.15,
    value_coef=0.1,
    normalize='reference',
    whiten_rewards=False,
  ),
  # arXiv:1909.08593 as published in code: rewards normalized before training
  # and whitened in it, the learning rate falls to 0.
  'lm_human': dict(
    reward='vader',
    rollout=512,
    batch_size=512,
    epochs=4,
    lr=1e-5,
    schedule='linear',
    clip_norm=0.0,
    kl='adaptive',
    coef=0.15,
    value_coef=0.1,
    normalize='reference',
    whiten_rewards=True,
  ),
}
# PPO with a learned reward has the modifications of `gt_ours` (the DPO paper,
# appendix C.1); set reward.name to model:WORKDIR of a reward model.
PRESETS['learned'] = PRESETS['gt_ours'] | dict(reward='')

# Controllers of the KL coefficient; target in nats of a whole response, horizon
# in samples.
KL = {
  'adaptive': dict(kind='adaptive', target=6.0, horizon=10000.0),
  'fixed': dict(kind='fixed'),
}

# Keys of `common.training` that are of offline data and losses.
_OFFLINE = ('epochs', 'peak_tflops', 'loss')


def get_config(arg=''):
  arg = common.parse(
    arg,
    preset='gt_ours',
    model='smollm2-135m',
    data='prompts',
    kl='preset',
    adapter='none',
    debug=False,
  )
  preset = common.pick(PRESETS, 'preset', arg['preset'])
  config = common.training(
    dict(
      data='jsonl' if arg['data'] == 'prompts' else arg['data'],
      loss='sft',  # whose form of data is any text with a prompt
      model=arg['model'],
      adapter=arg['adapter'],
      reference='adapter_off' if arg['adapter'] == 'lora' else 'frozen',
      optim='adamw',
      debug=arg['debug'],
    )
  )
  with config.unlocked():
    for name in _OFFLINE:
      del config[name]
    del config.data.row_length, config.eval.batch_size, config.eval.max_groups
    if arg['data'] == 'prompts':
      config.data = dict(
        task='prompts',
        # openings: of movie reviews, which ship with us; or JSON Lines with a
        # `prompt` each, and held-out ones in eval.samples.prompts
        source='openings',
        chat_template='',  # file for prompts of messages; '': the model's own
      )
    config.data.max_prompt_tokens = 64  # a longer prompt keeps its tail
    config.data.max_response_tokens = 64  # where a sample is cut

    config.num_steps = 100  # rollouts
    config.batch_size = preset['batch_size']  # samples an update (a minibatch)
    config.rollout = dict(
      size=preset['rollout'],  # samples a step: a multiple of batch_size
      batch_size=64,  # sampled at once
      temperature=1.0,  # the only one whose KL is the policy's
    )
    config.reward = dict(
      name=preset['reward'],  # see dpo_jax/rewards.py: sentiment:FILE, ...
      # none; reference: to mean 0 and variance 1 on a rollout of the first
      # policy; running: on all rollouts so far
      normalize=preset['normalize'],
      no_eos_penalty=0.0,  # off the normalized reward of what does not end
    )
    kind = preset['kl'] if arg['kl'] == 'preset' else arg['kl']
    config.kl = common.pick(KL, 'controller of the KL', kind)
    config.kl.coef = preset['coef']  # of the KL in the rewards, at first
    config.kl.estimator = 'k1'  # of a token: k1 (log-ratio) | k3 (never < 0)
    config.ppo = dict(
      epochs=preset['epochs'],  # passes over a rollout
      gamma=1.0,
      lam=0.95,
      clip=0.2,  # of the ratio
      value_clip=0.2,
      value_coef=preset['value_coef'],
      whiten_rewards=preset['whiten_rewards'],
      whiten_advantages=True,
    )
  config.optim.lr = preset['lr']
  config.optim.schedule = preset['schedule']  # in updates, as warm-up is
  config.optim.warmup_steps = 0
  config.optim.warmup_init = 0.0
  config.optim.clip_norm = preset['clip_norm']
  config.log_every = 1
  config.checkpoint.every = config.eval.every = 25
  samples = config.eval.samples
  samples.reward = ''  # '': reward.name
  samples.num_prompts = 32
  samples.samples_per_prompt = 4
  samples.max_new_tokens = config.data.max_response_tokens
  if arg['debug']:
    config.num_steps = 2
    config.batch_size = 8
    config.rollout.size = 16
    config.reward.name = 'length'
    config.data.max_response_tokens = samples.max_new_tokens = 8
    samples.num_prompts = samples.samples_per_prompt = 2
  return config.lock()
