"""The command line, as a person types it."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import main
from dpo_jax import weights
from dpo_jax import workdirs
from tests import processes_test
from tests import weights_test
from tests import worlds

ROOT = pathlib.Path(__file__).parents[1]


def dpo_jax(*arguments, **more):
  env = os.environ | {'PYTHONPATH': str(ROOT)} | more
  env['XLA_FLAGS'] = env['XLA_FLAGS'].replace('_count=8', '_count=1')
  return subprocess.run(
    [sys.executable, '-m', 'dpo_jax.main', *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=env,
    check=False,
  )


def options(tmp_path, *more):
  source = worlds.write_pairs(tmp_path)
  return (
    '--config=configs/preference.py:data=jsonl,debug',
    f'--config.data.source={source}',
    f'--config.data.cache_dir={tmp_path / "data"}',
    f'--workdir={tmp_path / "run"}',
    *more,
  )


def test_an_interrupted_process_says_so_in_one_line(capsys):
  def interrupted():
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as end:
    main.ends_all(interrupted)
  assert end.value.code == 130
  error = capsys.readouterr().err
  assert error.startswith('dpo-jax: interrupted; ') and error.count('\n') == 1


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path):
  arguments = [
    *('sample', *options(tmp_path)[:3], '--prompt=a question: '),
    '--config.eval.samples.temperature=1',
  ]
  started = [processes_test.launch(n, arguments, devices=1) for n in (1, 2)]
  codes, outs, errors = processes_test.outcome([*started[0], *started[1]])
  assert codes == [0, 0, 0], errors
  texts = [[t for t in o.splitlines() if t.startswith('{')] for o in outs]
  assert texts[0] and texts[0] == texts[1] and not texts[2]


def test_prepare_train_eval_sample(tmp_path):
  # Whatever asks for devices raises: a pod's worker has them not for itself.
  result = dpo_jax('prepare', *options(tmp_path), JAX_PLATFORMS='nowhere')
  assert result.returncode == 0, result.stderr
  assert 'kept' in result.stdout and '% full' in result.stdout
  assert not (tmp_path / 'run').exists()

  result = dpo_jax('train', *options(tmp_path, '--config.optim.lr=2e-3'))
  assert result.returncode == 0, result.stderr
  assert workdirs.finished(tmp_path / 'run')
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert saved['optim']['lr'] == 2e-3
  assert json.loads(result.stdout[: result.stdout.index('\n}') + 2]) == saved

  learned = '--config.optim.lr=2e-3'
  result = dpo_jax('eval', *options(tmp_path, learned, '--checkpoint=2'))
  assert result.returncode == 0, result.stderr
  values = json.loads(result.stdout)
  last = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1]
  assert values == json.loads(last)

  result = dpo_jax('sample', *options(tmp_path, '--prompt=question'))
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)['prompt'] == 'question'

  result = dpo_jax('convert', tmp_path / 'run', tmp_path / 'out')
  assert result.returncode == 0, result.stderr
  assert 'step 2, of debug-llama' in result.stdout
  like = weights.load(tmp_path / 'out')
  _, items = workdirs.restore(
    str(tmp_path / 'run'), {'params': jax.tree.map(jnp.asarray, like.params)}
  )
  weights_test.assert_trees_equal(like.params, jax.device_get(items['params']))
  assert like.tokenizer.eos_id == 256

  result = dpo_jax('convert', 'debug-llama', tmp_path / 'out')
  assert result.returncode != 0
  assert '--overwrite' in result.stderr and 'Traceback' not in result.stderr
  result = dpo_jax(
    'convert',
    'debug-llama',
    tmp_path / 'out',
    '--overwrite',
    '--dtype=bfloat16',
    '--shard_size=200KB',
  )
  assert result.returncode == 0, result.stderr
  assert (tmp_path / 'out' / 'model-00002-of-00002.safetensors').exists()

  result = dpo_jax('eval', *options(tmp_path, '--config.loss.dpo.beta=0.3'))
  assert result.returncode != 0
  assert 'loss.dpo.beta: 0.1 -> 0.3' in result.stderr


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['trian'], "did you mean 'train'"),
    (['train'], 'needs --config'),
    (['train', 'twice'], 'expected one verb'),
    (['train', '--config', 'configs/sft.py:lss=sft'], "mean 'loss'"),
    (['train', '--config=configs/preference.py:loss=ipo_sam'], 'ipo_sum'),
    (['train', '--config=configs/sft.py:data=hh,lss=sft'], "mean 'loss'"),
    (
      ['train', '--config=configs/sft.py', '--config.optim.lrr=1'],
      'Did you mean "lr"',
    ),
    (
      ['train', '--config=configs/preference.py']
      + ['--config.reference.alpha=0.5'],
      "no key 'alpha' here",
    ),
    (['train', '--config=configs/sft.py'], 'add --workdir=DIR'),
    (['ppo', '--config=configs/ppo.py:debug'], 'add --workdir=DIR'),
    (
      ['train', '--config=configs/sft.py', '--checkpoint=best'],
      '--checkpoint is for eval, sample, convert',
    ),
    (
      ['convert', 'debug-llama', 'out', '--checkpoint=best'],
      'debug-llama is a model',
    ),
    (['sample', '--config=configs/sft.py:debug'], '--prompt='),
    (['convert', 'debug-llama'], 'dpo-jax convert SOURCE FOLDER'),
    (['convert', 'debug-lama', 'out'], "did you mean 'debug-llama'"),
    (['convert', 'debug-llama', 'out', '--dtype=int8'], 'should be one of'),
    (
      ['prepare', '--config=configs/sft.py:debug']
      + ['--config.data.source=nowhere'],
      'nowhere',
    ),
  ],
)
def test_mistakes_end_in_one_clear_line(arguments, message):
  result = dpo_jax(*arguments)
  assert result.returncode != 0
  assert message in result.stderr, result.stderr
  assert 'Traceback' not in result.stderr
