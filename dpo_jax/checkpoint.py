"""Training state on disk: Orbax, atomic, last n kept."""

import os

import jax
import orbax.checkpoint as ocp


def check_keep(keep):
  """Refuses to keep nothing."""
  if keep < 1:
    raise ValueError(
      f'checkpoint.keep is {keep}; keep at least 1, or the run is lost'
    )


class Checkpoints:
  """The checkpoints of one directory, one per step.

  A save writes to a temporary directory and renames it, so a killed process
  leaves the previous checkpoint as the newest; what it left half-written is
  removed.
  """

  def __init__(self, directory, *, keep):
    """Opens a directory; `keep` None only reads, for another run's."""
    if keep is None:
      options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    else:
      check_keep(keep)
      options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True
      )
    self._manager = ocp.CheckpointManager(
      os.path.abspath(directory), options=options
    )

  def latest(self):
    """Returns the step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step, items):
    """Starts saving {name: pytree of arrays}; arrays may be donated after."""
    saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    self._manager.save(step, args=ocp.args.Composite(**saves), force=True)

  def restore(self, step, like):
    """Loads the named items.

    Args:
      step: of the checkpoint.
      like: {name: pytree of arrays or of jax.ShapeDtypeStruct with a
        sharding}; gives shapes, dtypes and shardings.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      like,
    )
    restores = {
      name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()
    }
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(**restores)
      )
    except (ValueError, KeyError) as error:
      first = str(error).strip().splitlines()[0]
      raise ValueError(
        f'checkpoint {step} of {self._manager.directory} holds other'
        f' parameters or another optimizer than this config ({first})'
      ) from error
    return dict(restored)

  def close(self):
    """Waits for the saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()
