"""Several processes of one run: how they agree, and end.

`launches` lets them find each other, and JAX computes over the devices of all;
this is for what is beside that: one writes and the others wait, all hold the
same data, all stop after the same step, and none outlives the others. It goes
through the key-value store of the service that `jax.distributed` starts in
process 0. With one process there is nothing to agree on, and what is left is to
heed a SIGTERM.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time

import jax

PREEMPTED = 75  # exit status: saved, start again (EX_TEMPFAIL of sysexits.h)
_BEAT = 1.0  # seconds between signs of life
_LOST = 30  # beats without one after which a process is given up
# Seconds after a SIGTERM until a process ends whose main thread is still in
# C++, say in a compilation. Google Cloud's spot machines give 30.
GRACE = 25.0
_SOON = 5.0  # the same where nothing is there to be saved
_FOREVER = 7 * 24 * 3600 * 1000  # ms: whoever waits is ended by `_Watch`
AGAIN = (
  'see the logs of the others, and start all again: a run goes on from its last'
  ' checkpoint'
)
_STATUS = {'failed': 1, 'preempted': PREEMPTED}


class Preempted(SystemExit):
  """The run ends because of a SIGTERM; start it again to go on.

  `together`: all processes have saved and end now, else this one alone.
  """

  def __init__(self, what, *, together):
    super().__init__(PREEMPTED)
    self.what = what
    self.together = together


# --- Together ----------------------------------------------------------------


class _Group:
  """The processes, and what this one knows of the others."""

  def __init__(self):
    # Orbax reaches the key-value store this way too; there is no public one.
    from jax._src import distributed

    # Asking JAX for them would start its devices, which may be what failed.
    state = distributed.global_state
    self.client = state.client
    self.index, self.count = state.process_id, state.num_processes
    self.numbers = itertools.count()
    self.watch = _Watch(self)


_groups = []


def _group():
  """Returns the group of this process, None if it is alone."""
  if not _groups and jax.distributed.is_initialized():
    group = _Group()
    if group.count > 1:
      _groups.append(group)
      group.watch.start()
  return _groups[0] if _groups else None


def _called(function, *args):
  """Calls what waits in C++, where the main thread would heed no signal."""
  future = concurrent.futures.Future()

  def call():
    try:
      future.set_result(function(*args))
    except Exception as error:
      future.set_exception(error)

  threading.Thread(target=call, daemon=True).start()
  return future.result()


def alone() -> bool:
  """Whether there is one process."""
  return _group() is None


def first() -> bool:
  """Whether this process writes what is written once."""
  return alone() or _group().index == 0


def wait(what):
  """Waits until every process is here."""
  if group := _group():
    name = f'dpo_jax/{next(group.numbers)}/{what}'
    _called(group.client.wait_at_barrier, name, _FOREVER)


def agreed(value):
  """Returns process 0's value, which JSON can hold, in every process."""
  group = _group()
  if not group:
    return value
  key = f'dpo_jax/said/{next(group.numbers)}'
  if group.index == 0:
    group.client.key_value_set(key, json.dumps(value))
  return json.loads(_called(group.client.blocking_key_value_get, key, _FOREVER))


def gathered(value) -> list:
  """Returns the values of all processes, which JSON can hold."""
  group = _group()
  if not group:
    return [value]
  key = f'dpo_jax/gathered/{next(group.numbers)}'
  group.client.key_value_set(f'{key}/{group.index}', json.dumps(value))
  return [
    json.loads(
      _called(group.client.blocking_key_value_get, f'{key}/{i}', _FOREVER)
    )
    for i in range(group.count)
  ]


def check_same(what, text):
  """Refuses to go on where processes differ in a text.

  `what` is what the text says all of, with the fix: '... differ; ...'.
  """
  digests = gathered(hashlib.sha256(text.encode()).hexdigest())
  others = [i for i, digest in enumerate(digests) if digest != digests[0]]
  if others:
    raise ValueError(f'process {others[0]} and process 0: {what}')


@contextlib.contextmanager
def one_first():
  """Lets process 0 through, then the others.

  So that what process 0 downloads or prepares is there for those that share
  its disk.
  """
  if not first():
    wait('first')
  yield
  if first():
    wait('first')


# --- End ---------------------------------------------------------------------


def finish():
  """Waits for the others, at the end of what all have done."""
  if group := _group():
    wait('end')
    group.watch.end()
    jax.distributed.shutdown()
    _groups.clear()


def fail(text, status=1):
  """Ends this process and, with the same exit status, all it has joined."""
  if not _groups:  # nor are they looked for, now that something is wrong
    return
  group = _groups[0]
  say(text if first() else f'process {group.index}: {text}')
  group.watch.end()
  with contextlib.suppress(Exception):
    what = 'preempted' if status == PREEMPTED else 'failed'
    group.client.key_value_set(
      f'dpo_jax/news/{what}', json.dumps([group.index, text])
    )
  # The store ends with process 0, and the others must have read it.
  time.sleep(4 * _BEAT if first() else _BEAT)
  _leave(status)


def say(text):
  print(f'dpo-jax: {text}', file=sys.__stderr__, flush=True)


def _leave(status):
  """Ends at once: what usually runs at the end waits for other processes."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  os._exit(status)


class _Watch:
  """Gives signs of life and ends the process when another one has ended.

  Of a process whose life signs stop, process 0 says so after `_LOST` beats,
  counted, not timed, so that a machine that slept kills nobody. Where process 0
  is lost, the store is, which XLA notices.
  """

  def __init__(self, group):
    self._group = group
    self._ended = threading.Event()
    self._beats = {}  # process: (its last sign, our beats since)
    self._thread = threading.Thread(target=self._run, daemon=True)

  def start(self):
    self._thread.start()

  def end(self):
    self._ended.set()
    if threading.current_thread() is not self._thread:
      self._thread.join(timeout=10)

  def _run(self):
    index = self._group.index
    try:
      self._watch()
    except jax.errors.JaxRuntimeError as error:
      if self._ended.is_set():
        return
      first_line = str(error).splitlines()[0]
      say(f'process {index} lost the others ({first_line}); {AGAIN}')
      _leave(1)
    except Exception as error:  # unwatched, it might wait for ever
      say(f'process {index} cannot watch the others ({error!r}); {AGAIN}')
      _leave(1)

  def _watch(self):
    group, client = self._group, self._group.client
    for beat in itertools.count():
      if self._ended.wait(_BEAT if beat else 0):
        return
      client.key_value_set(
        f'dpo_jax/alive/{group.index}', str(beat), allow_overwrite=True
      )
      news = {
        key.rpartition('/')[2]: json.loads(value)
        for key, value in client.key_value_dir_get('dpo_jax/news/')
      }
      lost = self._lost() if group.index == 0 else None
      _STOP.settle(group, known='stop' in news)
      for what, status in _STATUS.items():
        if what in news:
          index, text = news[what]
          say(f'process {group.index} ends, as process {index} did: {text}')
          time.sleep(2 * _BEAT if group.index == 0 else 0)
          _leave(status)
      if lost is not None:
        seconds = _LOST * _BEAT
        fail(f'process {lost} gave no sign of life for {seconds:g} s; {AGAIN}')

  def _lost(self):
    """Returns a process that is not heard of any more, or None."""
    for key, sign in self._group.client.key_value_dir_get('dpo_jax/alive/'):
      index = int(key.rpartition('/')[2])
      before, silent = self._beats.get(index, (None, 0))
      silent = silent + 1 if sign == before else 0
      self._beats[index] = sign, silent
      if silent >= _LOST:
        return index
    return None


# --- SIGTERM -----------------------------------------------------------------


class _Stop:
  """When to stop: at the same call of `poll` in all processes."""

  def __init__(self):
    self.heeding = False
    self.polled = False
    self.wanted = False
    self.back = threading.Event()  # the main thread saves, or is done
    self._calls = 0
    self._said = False  # to the others, at which call this one is
    self._last = None  # the call at which all stop
    self._lock = threading.Lock()
    self._settled = threading.Event()

  def handle(self, *_):
    """Of the signal, once the main thread is in Python."""
    self.wanted = True  # first: a callback of C++ may swallow what is raised
    if not self.polled:
      raise Preempted('SIGTERM, with nothing to save', together=False)

  def listen(self, signals, grace):
    """Of the signal at once, in a thread, until `signals` is closed."""
    while number := signals.recv(1):
      if number[0] != signal.SIGTERM:
        continue
      self.wanted = True
      seconds = grace if self.polled else min(grace, _SOON)
      if not self.back.wait(seconds):
        text = (
          f'SIGTERM, and {seconds:g} s later still in one computation or'
          ' compilation, so nothing more is saved'
        )
        fail(text, PREEMPTED)
        say(text)
        _leave(PREEMPTED)

  def reached(self):
    if not _group():
      return self.wanted
    with self._lock:
      self._calls += 1
      held = self._said
    if held:
      self._settled.wait()
    return self._last is not None and self._calls >= self._last

  def settle(self, group, *, known):
    """Agrees with the others on the call: the next one of who is furthest.

    Every process holds still, at its next call, from when it says where it is
    until it has heard of all others. `known`: all know that one wants to stop.
    Called at every beat.
    """
    if self._last is not None:
      return
    if not known:
      if self.wanted and self.polled:
        group.client.key_value_set(
          'dpo_jax/news/stop', json.dumps(group.index), allow_overwrite=True
        )
      return
    with self._lock:
      said, self._said, calls = self._said, True, self._calls
    if not said:  # once: others may have read it, and the held call counts
      group.client.key_value_set(f'dpo_jax/calls/{group.index}', str(calls))
    all_said = group.client.key_value_dir_get('dpo_jax/calls/')
    if len(all_said) == group.count:
      self._last = max(int(value) for _, value in all_said) + 1
      self._settled.set()


_STOP = _Stop()


@contextlib.contextmanager
def heed_sigterm(*, grace=GRACE):
  """Within, a SIGTERM raises `Preempted`.

  At once, or, from `heed_by_poll` on, when all processes `poll`. A process that
  has not come so far after `grace` seconds, because its main thread is in C++,
  ends with the same status and saves nothing. Within another one, this one's
  end only ends what `heed_by_poll` began.
  """
  main = threading.current_thread() is threading.main_thread()
  outer = _heeding(grace) if main and not _STOP.heeding else None
  with outer or contextlib.nullcontext():
    try:
      yield
    finally:
      _STOP.polled = False


@contextlib.contextmanager
def _heeding(grace):
  _STOP.heeding, _STOP.wanted = True, False
  _STOP.back.clear()
  # Python's handler runs when the main thread is back from C++; what C writes
  # to this file is read at once.
  signals, written = socket.socketpair()
  written.setblocking(False)
  file = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
  before = signal.signal(signal.SIGTERM, _STOP.handle)
  listener = threading.Thread(
    target=_STOP.listen, args=(signals, grace), daemon=True
  )
  listener.start()
  try:
    yield
  finally:
    _STOP.heeding = False
    _STOP.back.set()
    if before is not None:
      signal.signal(signal.SIGTERM, before)
    signal.set_wakeup_fd(file)
    written.close()
    listener.join()
    signals.close()


@contextlib.contextmanager
def saving():
  """Within, at the last save of a run, no SIGTERM ends the process.

  However long it takes: ended, it would have been for nothing.
  """
  before = _STOP.back.is_set()
  _STOP.back.set()
  try:
    yield
  finally:
    if not before:
      _STOP.back.clear()


def heed_by_poll():
  """Leaves it to `poll` to raise `Preempted`, between two steps."""
  _STOP.polled = True


def poll():
  """Raises `Preempted` where all processes have agreed to stop.

  All call it equally often, between the same steps of their work. Before
  `heed_by_poll` each raises for itself.
  """
  if _STOP.polled and _STOP.reached():
    _STOP.back.set()
    raise Preempted('SIGTERM', together=True)
  if not _STOP.polled and _STOP.wanted:
    raise Preempted('SIGTERM, with nothing to save', together=False)
