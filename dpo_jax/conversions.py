"""Any model or adapter as a folder that other libraries load: `convert`.

source                      becomes
what `model.source` names   a Hugging Face folder
the same and --adapter      the same, of the merged weights
workdir of a run            a Hugging Face folder
of an adapter's run         PEFT's folder, or with --merge a Hugging Face one
"""

import collections
import dataclasses
import os
import pathlib

import jax
import numpy as np
import tqdm

from dpo_jax import adapters
from dpo_jax import exports
from dpo_jax import policies
from dpo_jax import weights
from dpo_jax import workdirs
from dpo_jax.models import families
from dpo_jax.models import heads
from dpo_jax.models import layouts
from dpo_jax.models import lora


def convert(
  source,
  folder,
  *,
  adapter='',
  merge=False,
  dtype='auto',
  shard_size='5GB',
  overwrite=False,
  which='newest',
) -> str:
  """Writes a model or an adapter; returns an account of it.

  Args:
    source: what `policies.open_source` takes, or the workdir of a run.
    folder: to write.
    adapter: PEFT's folder, to merge into the weights of a source.
    merge: merge the adapter of a run into its model instead of writing it.
    dtype: one of `exports.DTYPES`, of models.
    shard_size: bytes a file holds at most, as a text such as '500MB'.
    overwrite: replace a model, or an adapter, that is in the folder already.
    which: checkpoint of a run, see `checkpoint.restore`.
  """
  if dtype not in exports.DTYPES:
    raise ValueError(
      f'dtype is {dtype!r}; use one of {", ".join(exports.DTYPES)}'
    )
  size = exports.parse_size(shard_size)
  run = _Run(str(source), which) if _is_run(source) else None
  if run is None and which != 'newest':
    raise ValueError(f'--checkpoint is for runs; {source} is a model')
  adapted = run is not None and run.config['adapter']['kind'] != 'none'
  if run is not None and adapter:
    raise ValueError(
      f'{source} is a run; --adapter is for models. A run that trained an'
      ' adapter has its own, which --merge merges'
    )
  if merge and not adapted:
    raise ValueError(
      f'{source} trained no adapter that --merge could merge; leave it out, or'
      " give a model and --adapter=PEFT's folder"
    )
  if adapted and not merge:
    if dtype not in ('auto', 'float32'):
      raise ValueError(
        f'adapters are stored as float32, not as {dtype}; add --merge for a'
        ' model, or leave --dtype out'
      )
    return _write_adapter(run, folder, overwrite=overwrite)
  target = pathlib.Path(folder).expanduser()
  exports.check_target(target, overwrite=overwrite)
  model = run.read() if run else read(source, adapter=adapter)
  if dtype != 'auto':
    kinds = dict.fromkeys(model.dtypes, weights.dtype_named(dtype))
    model = dataclasses.replace(model, dtypes=kinds)
  written = exports.write(model, folder, shard_size=size, overwrite=overwrite)
  return _account(model, folder, written)


def read(source, *, adapter='') -> exports.Model:
  """Reads a model, and merges PEFT's folder `adapter` into it, if any."""
  checkpoint = policies.open_source(source)
  if adapter:
    family = families.family_of(checkpoint.family)
    pairs, how = adapters.load(adapter, checkpoint.config, family=family)
    return _merged(
      dataclasses.replace(
        checkpoint, source=f'{checkpoint.source} with {adapter}'
      ),
      pairs,
      how,
    )
  params = _assemble(checkpoint)
  if checkpoint.tensors is None:
    return exports.with_parameters(checkpoint, params)
  names = exports.tensor_shapes(checkpoint)
  tensors = [checkpoint.tensors[name] for name in names]
  return exports.Model(
    checkpoint,
    params,
    dtypes={name: t.dtype for name, t in zip(names, tensors)},
    stored=collections.Counter(tensor.stored for tensor in tensors),
  )


def _assemble(checkpoint, *, dtype=None):
  """Reads all parameters, with a bar."""
  number = sum(int(np.prod(shape)) for shape in checkpoint.shapes.values())
  with tqdm.tqdm(total=number, desc='reading', unit_scale=True) as bar:

    def progress(pieces):
      for piece in pieces:
        bar.update(piece.array.size)
        yield piece
        del piece

    return weights.assemble(checkpoint, dtype=dtype, progress=progress)


def _merged(checkpoint, adapter, how) -> exports.Model:
  """Merges in float32, whatever the model is stored as."""
  params = _assemble(checkpoint, dtype='float32')
  merged = lora.merge(params, adapter, how.scale)
  return exports.with_parameters(checkpoint, merged)


# --- Runs --------------------------------------------------------------------


def _is_run(source) -> bool:
  folder = pathlib.Path(source).expanduser()
  if (folder / 'round_1').is_dir():
    raise ValueError(
      f'{source} holds rounds; give the run of one, such as'
      f' {folder / "round_1" / "train"}'
    )
  return (folder / 'checkpoints').is_dir() and 'model' in workdirs.read_config(
    str(folder)
  )


class _Run:
  """A checkpoint of a run; its config says of which model."""

  def __init__(self, workdir: str, which: str):
    self.workdir = os.path.expanduser(workdir)
    self._which = which
    self.config = workdirs.read_config(self.workdir)
    opened = policies.open_source(self.config['model']['source'])
    tokenizer = opened.tokenizer
    if tokenizer is not None:
      template = self.config['data']['chat_template']
      tokenizer = policies.templated(tokenizer, template)
    self._opened = dataclasses.replace(opened, tokenizer=tokenizer)

  def read(self) -> exports.Model:
    """Reads its model; an adapter is merged."""
    if self.config['adapter']['kind'] != 'none':
      checkpoint, adapter, how = self.adapter()
      return _merged(checkpoint, adapter, how)
    checkpoint, params = self._restore(
      layouts.tree(
        {
          path: np.broadcast_to(np.float32(0), shape)
          for path, shape in self._opened.shapes.items()
        }
      )
    )
    return exports.with_parameters(checkpoint, params)

  def adapter(self):
    """Reads its adapter: (checkpoint of the base, adapter, lora.Lora)."""
    new, how = policies.open_adapter(
      self.config['adapter'], self._opened.config, key=jax.random.key(0)
    )
    return *self._restore(new), how

  def _restore(self, like):
    """Returns (checkpoint that says where from, what was trained).

    Other libraries' folders have no place for a head, so it is left out.
    """
    if workdirs.has_head(self.workdir, which=self._which):
      width = self._opened.config.d_model
      like = like | {'head': heads.init(jax.random.key(0), width, scale=0.0)}
    # Any device will do, and the host's memory is the largest.
    place = jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=place), like
    )
    step, items = workdirs.restore(
      self.workdir, {'params': like}, which=self._which
    )
    source = f'{self.workdir}, step {step}, of {self._opened.source}'
    checkpoint = dataclasses.replace(self._opened, source=source)
    return checkpoint, heads.without(items['params'])


def _write_adapter(run: _Run, folder, *, overwrite: bool) -> str:
  adapters.check_target(folder, overwrite=overwrite)
  checkpoint, adapter, how = run.adapter()
  sizes = adapters.save(
    folder,
    adapter,
    how,
    checkpoint.config,
    family=families.family_of(checkpoint.family),
    base=str(run.config['model']['source'])
    .removeprefix('hf:')
    .partition('@')[0],
    overwrite=overwrite,
  )
  number = sum(x.size for x in jax.tree.leaves(adapter))
  return (
    f'read {checkpoint.source}\n'
    f'    family      {checkpoint.family}\n'
    f'    adapter     {number:,} parameters, alpha / rank {how.scale:g}, on'
    f' {how.targets}\n'
    f'wrote {folder}: {sum(sizes.values()):,} bytes\n{_files(sizes)}'
  )


# --- Accounts ----------------------------------------------------------------


def _account(model, folder, written) -> str:
  checkpoint, tokenizer = model.checkpoint, model.checkpoint.tokenizer
  shapes = exports.tensor_shapes(checkpoint)
  has = 'none'
  if tokenizer is not None:
    template = 'no' if tokenizer.template is None else 'a'
    has = f'{tokenizer.vocab_size:,} tokens, {template} chat template'
  number = sum(int(np.prod(shape)) for shape in shapes.values())
  return (
    f'read {checkpoint.source}\n'
    f'    family      {checkpoint.family}\n'
    f'    parameters  {number:,} in {len(shapes):,} tensors\n'
    f'    stored as   {_counts(model.stored)}\n'
    f'    tokenizer   {has}\n'
    f'wrote {folder}: {sum(written.files.values()):,} bytes, tensors as'
    f' {_counts(written.dtypes)}\n{_files(written.files)}'
  )


def _counts(kinds) -> str:
  return ', '.join(f'{kind} ({number})' for kind, number in kinds.items())


def _files(sizes) -> str:
  return '\n'.join(
    f'    {name:34} {size:16,} bytes' for name, size in sizes.items()
  )
