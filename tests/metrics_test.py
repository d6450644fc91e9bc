import json
import os

from dpo_jax import metrics


def test_what_a_killed_process_wrote_too_much_is_removed(tmp_path):
  writer = metrics.Writer(tmp_path, after=-1)
  for step in range(4):
    writer.write(step, {'train/loss': step / 2}, [{'response': f'text {step}'}])
  writer.close()
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 4, "train/lo')  # cut by the kill
  writer = metrics.Writer(tmp_path, after=2)
  writer.write(3, {'train/loss': 9.0})
  writer.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 0, 'train/loss': 0.0},
    {'step': 1, 'train/loss': 0.5},
    {'step': 2, 'train/loss': 1.0},
    {'step': 3, 'train/loss': 9.0},
  ]
  samples = metrics.read(tmp_path, 'samples.jsonl')
  assert [s['step'] for s in samples] == [0, 1, 2]
  assert list((tmp_path / 'tensorboard').iterdir())


def test_what_is_synced_is_on_the_disk(tmp_path, monkeypatch):
  on_disk = {}

  def fsync(file):
    for path in tmp_path.glob('*.jsonl'):
      if os.path.sameopenfile(file, os.open(path, os.O_RDONLY)):
        on_disk[path.name] = path.read_text()

  writer = metrics.Writer(tmp_path, after=-1)
  writer.write(1, {'train/loss': 0.5}, [{'response': 'text'}])
  monkeypatch.setattr(os, 'fsync', fsync)
  writer.sync()
  assert json.loads(on_disk['metrics.jsonl'])['step'] == 1
  assert json.loads(on_disk['samples.jsonl'])['response'] == 'text'
  writer.close()


def test_a_missing_file_has_no_records(tmp_path):
  assert metrics.read(tmp_path) == []
