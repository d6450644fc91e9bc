"""What a peer says to the benchmark, and is told: lines of JSON, no imports.

    python -m experiments.peers.NAME FOLDER --micro=N

FOLDER has `policy/` and `ref/`, Hugging Face checkpoints, and `task.json`: the
settings and `steps` of an epoch, of each the pairs, of each the tokens of
`prompt`, `chosen` and `rejected`; `timed` and one of them are asked for. A peer
builds what it needs and says which versions it has. Told a number on its
standard input it does so many steps and answers with their losses (of the
parameters before the step), the process and clock seconds of all of them
together and its peak memory. A peer that has ended a step calls `Steps.end`,
which returns when the next one is due, so anybody's own training loop can be
stopped between two steps.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import time


def peak_memory():
  """Most bytes that this process had in memory so far."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmHWM'):
      return int(line.split()[1]) * 1024
  raise OSError('/proc/self/status does not say VmHWM')


def arguments():
  """Returns (folder, task, pairs of a micro-batch) of the command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--micro', type=int, required=True)
  options = parser.parse_args()
  task = json.loads((options.folder / 'task.json').read_text())
  return options.folder, task, min(options.micro, task['batch_size'])


class Steps:
  """The benchmark's end of the conversation, seen from a training loop."""

  def __init__(self, *packages, memory=peak_memory):
    """Names packages whose versions count; `memory()` is the peak in bytes."""
    # Whatever else a library prints must not be taken for an answer.
    self._out = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    self._packages, self._memory = packages, memory
    self._left = 0

  def begin(self):
    """Says that all is ready and waits for the first order."""
    versions = {
      name: importlib.metadata.version(name) for name in self._packages
    }
    self._answer({'python': sys.version.split()[0]} | versions)

  def end(self, loss):
    """Counts a step; between two orders, returns when the next one comes."""
    self._losses.append(float(loss))
    self._left -= 1
    if not self._left:
      self._answer(
        {
          'losses': self._losses,
          'process': time.process_time() - self._process,
          'wall': time.perf_counter() - self._wall,
          'peak_memory': self._memory(),
        }
      )

  def _answer(self, content):
    self._out.write(json.dumps(content) + '\n')
    self._out.flush()
    order = sys.stdin.readline()
    if not order.strip():  # no more steps: whatever loop this is ends here
      os._exit(0)
    self._left, self._losses = int(order), []
    self._process, self._wall = time.process_time(), time.perf_counter()
