"""How processes find each other: flags, the environment, and mistakes."""

import socket

import pytest

from dpo_jax import launches


@pytest.mark.parametrize(
  'flags, environment, message',
  [
    (('host', 2, 0), {}, 'write HOST:PORT'),
    (('127.0.0.1:99999', 2, 0), {}, 'write HOST:PORT'),
    (('no-such-host.invalid:1234', 2, 0), {}, 'which this machine does not'),
    (('127.0.0.1:1234', 2, 2), {}, 'it is one of 0 to 1'),
    (('127.0.0.1:1234', 2, -1), {}, 'it is one of 0 to 1'),
    (('127.0.0.1:1234', 0, 0), {}, 'use 1 or more'),
    ((None, 2, 0), {}, 'needs --coordinator too'),
    (('127.0.0.1:1234', None, None), {}, 'needs --num_processes and'),
    ((None, None, None), {'JAX_NUM_PROCESSES': 'two'}, 'it is a number'),
    ((None, None, None), {'JAX_PROCESS_ID': '1'}, 'needs --coordinator and'),
  ],
)
def test_bad_addresses_and_numbers_name_the_fix(flags, environment, message):
  with pytest.raises(ValueError, match=message):
    launches.find(*flags, environment)


SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_LOCALID': '0',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
}


@pytest.mark.parametrize(
  'flags, environment, found',
  [
    ((None, None, None), {}, ('alone', None, None)),
    ((None, 1, None), SLURM, ('alone', None, None)),
    ((None, None, None), SLURM, ('SLURM', 2, 1)),
    ((None, None, None), SLURM | {'SLURM_NTASKS': '1'}, ('alone', None, None)),
    (
      (None, None, None),
      {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'},  # a batch script, no srun
      ('alone', None, None),
    ),
    (('127.0.0.1:1', 2, 1), SLURM, ('explicit', 2, 1)),
    (
      (None, None, None),
      {
        'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1',
        'JAX_NUM_PROCESSES': '3',
        'JAX_PROCESS_ID': '2',
      },
      ('explicit', 3, 2),
    ),
    (
      (None, None, None),
      {
        'OMPI_MCA_orte_hnp_uri': 'x',
        'OMPI_COMM_WORLD_SIZE': '4',
        'OMPI_COMM_WORLD_RANK': '3',
      },
      ('MPI', 4, 3),
    ),
  ],
)
def test_who_takes_part_is_known_from_flags_or_the_environment(
  flags, environment, found
):
  launch = launches.find(*flags, environment)
  assert (launch.how, launch.number, launch.index) == found


def test_a_taken_port_is_named():
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f'port {port} of --coordinator is'):
      launches.find(f'127.0.0.1:{port}', 2, 0, {})


@pytest.mark.parametrize(
  'launch, message',
  [
    (
      launches.Launch('explicit', '127.0.0.1:7', 4, 2),
      'process 2 waited 9 s for process 0 and gave up; start all 4 processes'
      ' with the same --coordinator (process 0: 127.0.0.1:7) within'
      ' --start_timeout, and let the port through',
    ),
    (
      launches.Launch('SLURM', None, 4, 0),
      'process 0 waited 9 s for the others and gave up; start all 4 processes'
      ' within --start_timeout, and let the port through',
    ),
    (
      launches.Launch('TPU'),
      'this process waited 9 s for process 0 and gave up; start all processes'
      ' within --start_timeout, and let the port through',
    ),
  ],
)
def test_who_gives_up_names_only_flags_that_were_given(
  monkeypatch, launch, message
):
  seen = []
  monkeypatch.setattr(launches.processes, 'say', seen.append)
  monkeypatch.setattr(launches.os, '_exit', seen.append)
  launches._give_up(launch, 9.0)
  assert seen == [message, 1]
