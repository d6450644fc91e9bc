"""Several processes of one run: how they find each other, agree, and end.

JAX computes over the devices of all of them; this is for what is beside that:
one writes and the others wait, all hold the same data, all stop after the same
step, and none outlives the others. It goes through the key-value store of the
service that `jax.distributed` starts in process 0. With one process there is
nothing to agree on and all of this does nothing.
"""

import contextlib
import dataclasses
import glob
import hashlib
import importlib.util
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


# --- Start -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
  """Who is in a run: how it is known, and what of it is known already."""

  how: str  # 'alone', 'explicit', or who tells JAX the rest
  coordinator: str | None = None
  number: int | None = None
  index: int | None = None


def find(coordinator, number, index, environment) -> Launch:
  """Decides from flags (None: not given) and the environment who is in a run.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID stand for flags
  that are not given; one process is always alone.
  """

  def number_of(name):
    text = environment.get(name)
    if text is not None and not text.isdecimal():
      raise ValueError(f'${name} is {text!r}; it is a number')
    return None if text is None else int(text)

  given = {
    '--coordinator': coordinator or environment.get('JAX_COORDINATOR_ADDRESS'),
    '--num_processes': number_of('JAX_NUM_PROCESSES')
    if number is None
    else number,
    '--process_id': number_of('JAX_PROCESS_ID') if index is None else index,
  }
  coordinator, number, index = given.values()
  if number == 1 and not index:
    return Launch('alone')
  missing = [name for name, value in given.items() if value is None]
  if len(missing) < len(given):
    if missing:
      raise ValueError(
        f'{" and ".join(set(given) - set(missing))} needs'
        f' {" and ".join(missing)} too; give all three to every process, or'
        ' none where SLURM or a TPU pod says who takes part'
      )
    _check_explicit(coordinator, number, index)
    return Launch('explicit', coordinator, number, index)
  steps = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_LOCALID')
  if all(name in environment for name in steps):
    number, index = number_of('SLURM_NTASKS'), number_of('SLURM_PROCID')
    return (
      Launch('alone') if number == 1 else Launch('SLURM', None, number, index)
    )
  if 'OMPI_MCA_orte_hnp_uri' in environment:
    number = number_of('OMPI_COMM_WORLD_SIZE')
    index = number_of('OMPI_COMM_WORLD_RANK')
    return (
      Launch('alone') if number == 1 else Launch('MPI', None, number, index)
    )
  # Not by asking JAX, which would start the TPU before the processes are one.
  if importlib.util.find_spec('libtpu') and (
    glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
  ):
    return Launch('TPU')
  return Launch('alone')


def _check_explicit(coordinator, number, index):
  host, colon, port = coordinator.rpartition(':')
  if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ValueError(
      f'--coordinator is {coordinator!r}; write HOST:PORT, where process 0 runs'
      ' and a free port there'
    )
  if number < 1:
    raise ValueError(f'--num_processes is {number}; use 1 or more')
  if not 0 <= index < number:
    raise ValueError(
      f'--process_id is {index}, but of {number} processes it is one of 0 to'
      f' {number - 1}'
    )
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except OSError as error:
    raise ValueError(
      f'--coordinator names the host {host!r}, which this machine does not know'
      f' ({error.strerror}); give the name or address of process 0'
    ) from error
  if index == 0:
    with socket.socket() as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        probe.bind(('', int(port)))
      except OSError as error:
        raise ValueError(
          f'port {port} of --coordinator is taken on this machine'
          f' ({error.strerror}); choose another'
        ) from error


def start(launch: Launch, *, timeout: float):
  """Joins the processes of a run; before anything asks JAX for devices.

  From here on this process ends when another one does. Only process 0 writes to
  the screen, but for what ends the others.

  Args:
    launch: of `find`.
    timeout: seconds to wait until all are there.
  """
  if launch.how == 'alone':
    return
  # Python handles SIGTERM here; JAX's service would take it away.
  jax.config.update('jax_enable_preemption_service', False)
  late = threading.Timer(timeout, _give_up, (launch, timeout))
  late.daemon = True
  late.start()
  try:
    # Its own timeout aborts with a stack trace, so ours comes first.
    jax.distributed.initialize(
      launch.coordinator,
      launch.number,
      launch.index,
      initialization_timeout=int(timeout) + 60,
      heartbeat_timeout_seconds=50,  # for who dies before `_Watch` knew it
    )
  except ValueError:
    if launch.how != 'TPU':
      raise
    return  # one TPU host that knows of no others
  finally:
    late.cancel()
  if jax.process_count() > 1:
    _group()
    if jax.process_index():
      sys.stdout = sys.stderr = open(os.devnull, 'w')
  print(
    f'{jax.process_count()} processes, {jax.device_count()} devices, of which'
    f' {jax.local_device_count()} are of process {jax.process_index()}'
  )


def _give_up(launch, timeout):
  me = 'this process' if launch.index is None else f'process {launch.index}'
  rest = 'the others' if launch.index == 0 else 'process 0'
  where = launch.coordinator or f'where {launch.how} says it is'
  _say(
    f'{me} waited {timeout:g} s for {rest} and gave up; start all'
    f' {launch.number or ""} processes with the same --coordinator (process 0:'
    f' {where}) within --start_timeout, and let the port through'
  )
  os._exit(1)


# --- Together ----------------------------------------------------------------


class _Group:
  """The processes, and what this one knows of the others."""

  def __init__(self):
    # Orbax reaches the key-value store this way too; there is no public one.
    from jax._src import distributed

    self.client = distributed.global_state.client
    self.index, self.count = jax.process_index(), jax.process_count()
    self.numbers = itertools.count()
    self.watch = _Watch(self)


_groups = []


def _group():
  """Returns the group of this process, None if it is alone."""
  # Without the service there is one process, and JAX is not asked, which would
  # start a device.
  if not _groups and jax.distributed.is_initialized():
    if jax.process_count() > 1:
      _groups.append(_Group())
  return _groups[0] if _groups else None


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
    group.client.wait_at_barrier(name, _FOREVER)


def agreed(value):
  """Returns process 0's value, which JSON can hold, in every process."""
  group = _group()
  if not group:
    return value
  key = f'dpo_jax/said/{next(group.numbers)}'
  if group.index == 0:
    group.client.key_value_set(key, json.dumps(value))
  return json.loads(group.client.blocking_key_value_get(key, _FOREVER))


def gathered(value) -> list:
  """Returns the values of all processes, which JSON can hold."""
  group = _group()
  if not group:
    return [value]
  key = f'dpo_jax/gathered/{next(group.numbers)}'
  group.client.key_value_set(f'{key}/{group.index}', json.dumps(value))
  return [
    json.loads(group.client.blocking_key_value_get(f'{key}/{i}', _FOREVER))
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
  """Ends this process and, with the same exit status, all others."""
  group = _group()
  if not group:
    return
  _say(text if first() else f'process {group.index}: {text}')
  group.watch.end()
  with contextlib.suppress(Exception):
    what = 'preempted' if status == PREEMPTED else 'failed'
    group.client.key_value_set(
      f'dpo_jax/news/{what}', json.dumps([group.index, text])
    )
  # The store ends with process 0, and the others must have read it.
  time.sleep(4 * _BEAT if first() else _BEAT)
  _leave(status)


def _say(text):
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
    self._thread.start()

  def end(self):
    self._ended.set()
    if threading.current_thread() is not self._thread:
      self._thread.join(timeout=10)

  def _run(self):
    group, client = self._group, self._group.client
    for beat in itertools.count():
      if self._ended.wait(_BEAT if beat else 0):
        return
      try:
        client.key_value_set(
          f'dpo_jax/alive/{group.index}', str(beat), allow_overwrite=True
        )
        news = {
          key.rpartition('/')[2]: json.loads(value)
          for key, value in client.key_value_dir_get('dpo_jax/news/')
        }
        lost = self._lost() if group.index == 0 else None
        _STOP.settle(group, known='stop' in news)
      except jax.errors.JaxRuntimeError as error:
        if self._ended.is_set():
          return
        first_line = str(error).splitlines()[0]
        _say(f'process {group.index} lost the others ({first_line}); {AGAIN}')
        _leave(1)
      for what, status in _STATUS.items():
        if what in news:
          index, text = news[what]
          _say(f'process {group.index} ends, as process {index} did: {text}')
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
    self.polled = False
    self._wanted = False
    self._calls = 0
    self._last = None  # the call at which all stop
    self._lock = threading.Lock()

  def handle(self, *_):
    """Of the signal."""
    if not self.polled:
      raise Preempted('SIGTERM before the first step', together=False)
    self._wanted = True

  def reached(self):
    if not _group():
      return self._wanted
    with self._lock:
      self._calls += 1
      return self._calls == self._last

  def settle(self, group, *, known):
    """Agrees with the others on the call: the next one of who is furthest.

    Every process holds still, at its next call, from when it says where it is
    until it has heard of all others. `known`: all know that one wants to stop.
    """
    if self._last is not None:
      return
    if self._wanted and not known:
      group.client.key_value_set(
        'dpo_jax/news/stop', json.dumps(group.index), allow_overwrite=True
      )
    if known:
      with self._lock:
        key = 'dpo_jax/calls'
        group.client.key_value_set(f'{key}/{group.index}', str(self._calls))
        calls = [
          int(group.client.blocking_key_value_get(f'{key}/{i}', 30_000))
          for i in range(group.count)
        ]
        self._last = max(calls) + 1


_STOP = _Stop()


@contextlib.contextmanager
def heed_sigterm():
  """Within, a SIGTERM raises `Preempted`.

  At once, or, from `heed_by_poll` on, when all processes `poll`.
  """
  before = None
  if threading.current_thread() is threading.main_thread():
    before = signal.signal(signal.SIGTERM, _STOP.handle)
  try:
    yield
  finally:
    _STOP.polled = False
    if before is not None:
      signal.signal(signal.SIGTERM, before)


def heed_by_poll():
  """Leaves it to `poll` to raise `Preempted`, between two steps."""
  _STOP.polled = True


def poll():
  """Raises `Preempted` where all processes have agreed to stop.

  All call it equally often, between the same steps of their work.
  """
  if _STOP.polled and _STOP.reached():
    raise Preempted('SIGTERM', together=True)
