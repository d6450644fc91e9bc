"""How the processes of one run find each other.

From flags, or from the environment of SLURM, Open MPI or a TPU pod; with that
`jax.distributed` is started. What they do together then is in `processes`.
"""

import dataclasses
import glob
import importlib.util
import os
import socket
import sys
import threading

import jax

from dpo_jax import processes


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
      found = [name for name in given if name not in missing]
      raise ValueError(
        f'{" and ".join(found)} needs'
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
  if launch.index is not None:
    print(f'process {launch.index} of {launch.number}', flush=True)
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
      heartbeat_timeout_seconds=50,  # for who dies before `processes` knew it
    )
  except ValueError:
    if launch.how != 'TPU':
      raise
    return  # one TPU host that knows of no others
  finally:
    late.cancel()
  # Before devices are asked for: where that fails, the others are told.
  if not processes.first():
    sys.stdout = sys.stderr = open(os.devnull, 'w')
  print(
    f'{jax.process_count()} processes, {jax.device_count()} devices, of which'
    f' {jax.local_device_count()} are of process {jax.process_index()}'
  )


def _give_up(launch, timeout):
  me = 'this process' if launch.index is None else f'process {launch.index}'
  rest = 'the others' if launch.index == 0 else 'process 0'
  number = '' if launch.number is None else f' {launch.number}'
  same = ''
  if launch.how == 'explicit':
    same = f' with the same --coordinator (process 0: {launch.coordinator})'
  processes.say(
    f'{me} waited {timeout:g} s for {rest} and gave up; start all{number}'
    f' processes{same} within --start_timeout, and let the port through'
  )
  os._exit(1)
