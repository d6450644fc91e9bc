"""Every config: its debug variant runs, its keys are read, typos are caught."""

import pytest

from configs import common
from configs import ppo as ppo_configs
from configs import preference
from configs import quickstart
from configs import sft
from dpo_jax import metrics
from dpo_jax import online
from dpo_jax import ppo
from dpo_jax import settings
from dpo_jax import train
from dpo_jax.losses import table
from tests import worlds


@pytest.mark.parametrize('model', ['debug-llama', 'debug-gpt2'])
@pytest.mark.parametrize('make', [preference, sft])
def test_debug_variants_train_and_sample(tmp_path, make, model):
  config = make.get_config('data=jsonl,debug')
  config.model.source = model
  config.data.source = str(worlds.write_pairs(tmp_path))
  config.data.cache_dir = str(tmp_path / 'data')
  train.train(settings.Settings(config.to_dict()), tmp_path / 'run')
  records = metrics.read(tmp_path / 'run')
  assert [r['step'] for r in records] == [0, 1, 2, 2]
  assert {'train/loss', 'train/row_fill'} <= set(records[1])
  assert {'heldout/loss', 'samples/kl'} <= set(records[-1])
  assert len(metrics.read(tmp_path / 'run', 'samples.jsonl')) == 4


def test_debug_quickstart_reports(tmp_path):
  config = quickstart.get_config('debug')
  config.train.data.cache_dir = str(tmp_path / 'data')
  config.rounds = 2
  text = online.run(settings.Settings(config.to_dict()), str(tmp_path / 'run'))
  assert 'mean reward' in text and 'sequence KL' in text
  for name in ('report.txt', 'report.json', 'curves.png', 'frontier.png'):
    for number in (1, 2):
      path = tmp_path / 'run' / f'round_{number}' / name
      assert path.stat().st_size > 100
  # A second call finds everything done and says the same.
  again = online.run(settings.Settings(config.to_dict()), str(tmp_path / 'run'))
  assert again == text


@pytest.mark.parametrize('name', table.LOSSES)
def test_every_loss_has_a_config(name):
  config = preference.get_config(f'loss={name}')
  assert config.loss.to_dict() == {name: table.options(name)}
  assert config.data.form == table.get(name).forms[0]
  reference = 'frozen' if table.get(name).reference else 'none'
  assert config.reference.to_dict() == {'mode': reference}


def test_sums_and_names_from_elsewhere_have_configs():
  config = preference.get_config('loss=dpo+sft,reference=ema')
  assert list(config.loss) == ['dpo', 'sft']
  assert config.data.form == 'pairs'
  assert config.reference.to_dict() == {'mode': 'ema'} | {
    'alpha': 0.6,
    'every': 512,
  }
  assert preference.get_config('loss=mpo').loss.bco.weight == 0.2
  config = preference.get_config('loss=bco_pair')
  assert config.loss.bco.shift == 'none'
  with pytest.raises(ValueError, match=r"'ipo_sum' .* and 'ipo_mean'"):
    preference.get_config('loss=ipo')
  with pytest.raises(ValueError, match='no form of data suits'):
    preference.get_config('loss=kto+dpo')


def test_the_papers_settings_are_the_default():
  config = preference.get_config('data=hh')
  assert config.batch_size == 64 and config.loss.dpo.beta == 0.1
  assert config.optim.name == 'rmsprop' and config.optim.lr == 1e-6
  assert config.optim.keywords.decay == 0.99
  assert config.optim.warmup_steps == 150
  assert config.optim.schedule == 'constant'


@pytest.mark.parametrize(
  'preset, sizes, kl, changes',
  [
    ('gt_trl', (256, 1), (0.2, 6.0), {'reward.normalize': 'none'}),
    ('gt_ours', (1024, 256), (0.15, 6.0), {'reward.normalize': 'reference'}),
    ('learned', (1024, 256), (0.15, 6.0), {'reward.name': ''}),
    ('lm_human', (512, 512), (0.15, 6.0), {'ppo.whiten_rewards': True}),
  ],
)
def test_ppo_has_the_settings_of_published_runs(preset, sizes, kl, changes):
  config = ppo_configs.get_config(f'preset={preset}')
  assert (config.rollout.size, config.batch_size) == sizes
  assert (config.kl.coef, config.kl.target) == kl
  assert config.kl.horizon == 10000.0 and config.ppo.epochs == 4
  assert (config.ppo.gamma, config.ppo.lam) == (1.0, 0.95)
  assert (config.ppo.clip, config.ppo.value_clip) == (0.2, 0.2)
  assert config.ppo.value_coef == 0.1 and config.ppo.whiten_advantages
  for name, value in changes.items():
    section, key = name.split('.')
    assert config[section][key] == value
  ppo.check_kl(dict(config.kl), config.rollout.size)
  lora = ppo_configs.get_config(f'preset={preset},adapter=lora,kl=fixed')
  assert lora.reference.mode == 'adapter_off'
  assert set(lora.kl) == {'kind', 'coef', 'estimator'}


@pytest.mark.parametrize(
  'arg, message',
  [
    ('los=dpo', "unknown config argument 'los'; did you mean 'loss'"),
    ('loss=ipo_sam', "did you mean 'ipo_sum'"),
    ('model=smollm2-135', "did you mean 'smollm2-135m'"),
    ('data=hhh', "did you mean 'hh'"),
    ('optim=adam', "did you mean 'adamw'"),
  ],
)
def test_typos_in_arguments_show_the_nearest_name(arg, message):
  with pytest.raises(ValueError, match=message):
    preference.get_config(arg)


def test_unknown_keys_cannot_be_set():
  config = preference.get_config()
  with pytest.raises((AttributeError, KeyError), match='lr'):
    config.optim.lrr = 1.0


def test_presets_are_copied_not_shared():
  config = preference.get_config('loss=dpo')
  config.loss.dpo.beta = 9.0
  assert table.options('dpo')['beta'] == 0.1
  assert preference.get_config('loss=dpo').loss.dpo.beta == 0.1
  assert common.pick(common.DATA, 'data set', 'hh') is not common.DATA['hh']
