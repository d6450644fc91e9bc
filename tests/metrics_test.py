import json
import os
import pathlib
import subprocess
import sys

from tensorboardX.proto import event_pb2

from dpo_jax import metrics

ROOT = pathlib.Path(__file__).parents[1]


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


def events(folder):
  """Returns {(step, name): value} of TensorBoard's files."""
  found = {}
  for path in sorted(folder.iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):  # length, its checksum, the event, its checksum
      size = int.from_bytes(data[at : at + 8], 'little')
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      for value in event.summary.value:
        found[event.step, value.tag] = value.simple_value
      at += 16 + size
  return found


def test_tensorboard_has_every_number(tmp_path):
  writer = metrics.Writer(tmp_path, after=-1)
  writer.write(1, {'train/loss': 0.5, 'heldout/rewards/accuracy': 0.25})
  writer.write(2, {'train/loss': 0.125})
  written = events(tmp_path / 'tensorboard')  # before it is closed too
  assert written == {
    (1, 'train/loss'): 0.5,
    (1, 'heldout/rewards/accuracy'): 0.25,
    (2, 'train/loss'): 0.125,
  }
  writer.close()


FULL = """
import os, resource, signal
from dpo_jax import metrics
os.mkdir('run')
writer = metrics.Writer('run', after=-1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
  for step in range(1000):
    writer.write(step, {f'train/{n}': 1.0 for n in range(20)})
finally:
  writer.close()
"""


def test_a_full_disk_ends_a_run_with_what_to_do(tmp_path):
  # In a process of its own, since the limit is for all that it does.
  found = subprocess.run(
    [sys.executable, '-c', FULL],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert found.returncode == 1
  last = found.stderr.strip().splitlines()[-1]
  assert "the log in 'run' could not be written (File too large)" in last
  assert 'free some space and start again' in last


def test_a_missing_file_has_no_records(tmp_path):
  assert metrics.read(tmp_path) == []
