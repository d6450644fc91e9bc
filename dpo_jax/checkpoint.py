"""Training state on disk: Orbax, atomic, last n kept."""

import os

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one directory, one per step.

  A save writes to a temporary directory and renames it, so a killed process
  leaves the previous checkpoint as the newest.
  """

  def __init__(self, directory, *, keep):
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=True, create=True
    )
    self._manager = ocp.CheckpointManager(
      os.path.abspath(directory), options=options
    )

  def latest(self):
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step, items):
    """Starts saving {name: pytree of arrays}; arrays may be donated after."""
    saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    self._manager.save(step, args=ocp.args.Composite(**saves), force=True)

  def restore(self, step, like):
    """Loads the named items into the shapes, dtypes, shardings of `like`."""
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      like,
    )
    restores = {
      name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()
    }
    return dict(
      self._manager.restore(step, args=ocp.args.Composite(**restores))
    )

  def close(self):
    """Waits for the saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()
