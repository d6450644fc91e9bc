r"""Measure our training step: what a step costs, and what it gets done.

The step is the one `dpo-jax train` compiles (DPO, beta 0.1, AdamW), fed by the
same plan of rows, that of a whole epoch, whose first steps are timed: as in
`train`, an epoch has one or two shapes. They are compiled and the first step is
done before the clock starts; then every step is waited for and timed by itself,
by the clock and by the process (user + system, all threads).

  python -m experiments.bench_step
  python -m experiments.bench_step --data=pairs.jsonl --batch_size=16
  python -m experiments.bench_step --data=FOLDER --subset=harmless-base \
      --shape=smollm2-135m --reference frozen cached --batch_size=8 --steps=2

A model of a billion parameters on one GPU, on long packed rows:

  python -m experiments.bench_step --data=FOLDER --shape=llama3.2-1b \
      --dtype=bfloat16 --remat=full --limit=512 --row_length=2048 \
      --batch_size=32 --chunk=1024 --steps=10

One thread: put before it

  taskset -c 0 env XLA_FLAGS='--xla_cpu_multi_thread_eigen=false \
      intra_op_parallelism_threads=1'

`--data` is `uniform` (random tokens, 64 of a prompt and of each response), a
JSON Lines file of pairs, or a folder of HH. Real tokens are those of a prompt,
once, and its two responses; row fill is their share of the slots computed. A
pair's prompt and responses have at most `--limit` tokens each.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import time

import jax
import numpy as np

from configs import preference
from dpo_jax import accounting
from dpo_jax import evaluators
from dpo_jax import objectives
from dpo_jax import optim
from dpo_jax import policies
from dpo_jax import ref_cache
from dpo_jax import runs
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.losses import table
from dpo_jax.models import lora
from dpo_jax.models import presets
from dpo_jax.models import transformer
from experiments.peers import protocol

TOY = '4/256/4/49152'  # layers / width / heads / vocabulary
UNIFORM = 64  # tokens of a prompt and of each response
BETA, LEARNING_RATE, CLIP_NORM = 0.1, 1e-4, 1.0
REFERENCES = ('frozen', 'cached', 'adapter_off')


# --- What is trained, and on what --------------------------------------------


def model_shape(text):
  """Returns the config of a name of `presets`, or of TOY and its like.

  The latter are Llamas with tied embeddings and an MLP three times as wide.
  """
  shapes = presets.MODELS | presets.DEBUG
  if text in shapes:
    return shapes[text]
  try:
    layers, width, heads, vocabulary = map(int, text.split('/'))
  except ValueError:
    raise SystemExit(
      f'--shape {text!r}: give layers/width/heads/vocabulary, such as {TOY},'
      f' or one of {", ".join(shapes)}'
    ) from None
  return transformer.TransformerConfig(
    vocab_size=vocabulary,
    d_model=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    d_ff=3 * width,
    norm='rms',
    norm_eps=1e-5,
    positions='rotary',
    max_positions=2048,
    rope_theta=1e6,  # Tunix's Llama computes with it, whatever it is told
    mlp='swiglu',
    attention_bias=False,
    mlp_bias=False,
    tied=True,
  )


def uniform_groups(number, *, vocab_size, length=UNIFORM, seed=0):
  """Returns pairs of random tokens in which there is no padding to save."""
  tokens = np.random.default_rng(seed).integers(
    3, vocab_size, size=(number, 3, length), dtype=np.int32
  )
  return [
    make_group(prompt, (chosen, rejected), id=str(n))
    for n, (prompt, chosen, rejected) in enumerate(tokens)
  ]


def epoch_steps(groups, options):
  """Steps of an epoch over `groups`, or all that are timed if that is more."""
  return max(options.steps + 1, len(groups) // options.batch_size)


def make_group(prompt, responses, *, id):
  """Returns a group with nothing but tokens."""
  return examples.Group(
    prompt=np.asarray(prompt, np.int32),
    responses=tuple(np.asarray(tokens, np.int32) for tokens in responses),
    weight=1.0,
    p=1.0,
    id=id,
  )


def load_groups(options, model_config):
  """Returns the pairs of `options.data`, tokenized as for training."""
  if options.data == 'uniform':
    number = options.batch_size * (options.steps + 1)
    return uniform_groups(number, vocab_size=model_config.vocab_size)
  task = 'hh' if pathlib.Path(options.data).is_dir() else 'jsonl'
  config = preference.get_config(f'data={task}')
  config.data.source = options.data
  if task == 'hh':
    config.data.subsets = tuple(options.subset)
  config.data.held_out = 0.0
  config.data.max_prompt_tokens = options.limit
  config.data.max_response_tokens = options.limit
  tokenizer = policies.open_source(options.tokenizer).tokenizer
  groups, report = runs.load_groups(
    settings.Settings(config.data.to_dict()), tokenizer, model_config, terms()
  )
  print(report)
  # Official test files are a split of their own; all of it is to be timed.
  return groups['train'] or groups['test']


def terms():
  """The loss: DPO."""
  return table.bind({'dpo': table.section('dpo')['dpo'] | {'beta': BETA}})


# --- The step ----------------------------------------------------------------


def random_parameters(model_config, mesh, *, seed=0):
  """Returns random parameters, placed as `policies.open_model` places them."""

  def boxed():
    return transformer.init_params(model_config, jax.random.key(seed))

  shardings = sharding.parameter_shardings(jax.eval_shape(boxed), mesh)
  unboxed = jax.jit(
    lambda: jax.tree.map(
      lambda leaf: leaf.value,
      boxed(),
      is_leaf=lambda leaf: hasattr(leaf, 'names'),
    ),
    out_shardings=shardings,
  )
  return unboxed()


def adapter_options():
  """The adapter of configs, LoRA."""
  section = preference.get_config('adapter=lora').adapter.to_dict()
  del section['kind']
  return lora.Lora(**section)


def new_adapter(model_config):
  return lora.init_adapter(model_config, adapter_options(), jax.random.key(0))


def make_run(
  model_config, params, ref_params, plan, mesh, *, reference, batch_size, chunk
):
  """Compiles the step for all shapes of `plan`, as `train` does.

  Args:
    model_config: of policy and reference.
    params: the policy's, or what an adapter is put on; donated.
    ref_params: the reference's; None for those of the policy at the start.
    plan: see `batches`.
    mesh: devices.
    reference: of REFERENCES.
    batch_size: pairs a step.
    chunk: see `logps.token_logps`.

  Returns:
    step number, from 0, -> loss as a float; numbers are taken in order.
  """
  base, trained, scale = None, params, 1.0
  if reference == 'adapter_off':
    base = transformer.cast(params, model_config.dtype)
    scale = adapter_options().scale
    adapter = new_adapter(model_config)
    boxed = lora.boxed(model_config, adapter)
    trained = jax.device_put(adapter, sharding.parameter_shardings(boxed, mesh))
  if ref_params is None and base is None:  # as in `runs`
    dtype = model_config.dtype
    ref_params = jax.jit(
      lambda tree: transformer.cast(jax.tree.map(jax.numpy.copy, tree), dtype)
    )(params)
  ref_values = None
  if reference == 'cached':
    ref_values = np.full(plan.starts[-1], np.nan, np.float32)
    ref_cache.compute(
      objectives.make_token_logps(model_config, chunk=chunk),
      {'params': ref_params},
      plan,
      mesh,
      ref_values,
      name='all pairs',
    )
    ref_params = None
  frozen = {'base': base, 'ref': ref_params}
  schedule = optim.learning_rate(
    lr=LEARNING_RATE,
    schedule='constant',
    warmup_steps=0,
    warmup_init=1.0,
    num_steps=plan.num_steps,
  )
  tx = optim.make(
    'adamw',
    schedule,
    clip_norm=CLIP_NORM,
    keywords=dict(optim.OPTIMIZERS['adamw']),
  )
  sums = objectives.make_sums(
    model_config,
    terms(),
    chunk=chunk,
    reference=reference,
    responses=plan.responses,
    form='pairs',
    rewards=False,
  )
  shapes = steps.state_shapes(trained, tx, ema=False, memory={})
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  step = jax.jit(
    steps.make_step(sums, tx, schedule, batch_size=batch_size, scale=scale),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  state = steps.init_state(trained, tx)

  def batch(number):
    return evaluators.put_batch(plan, number, mesh, ref_values=ref_values)

  firsts = {plan.shape_of(n): n for n in reversed(range(plan.num_steps))}
  compiled = {
    shape: step.lower(state, frozen, batch(number)).compile()
    for shape, number in firsts.items()
  }

  def run(number):
    nonlocal state
    state, values = compiled[plan.shape_of(number)](
      state, frozen, batch(number)
    )
    loss, count = jax.device_get(values['loss'])
    return float(loss) / float(count)

  return run


# --- The account -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Account:
  """What steps took: arrays [steps]; `slots` are what was computed.

  flops: see `accounting.step_flops`. peak_flops: a second, of all devices.
  """

  loss: np.ndarray
  wall: np.ndarray
  process: np.ndarray
  pairs: np.ndarray
  tokens: np.ndarray
  slots: np.ndarray
  flops: np.ndarray
  peak_memory: int
  peak_flops: float

  def rows(self):
    """{name: array}, a number a step."""
    return {
      'pairs/s': self.pairs / self.wall,
      'real tokens/s': self.tokens / self.wall,
      'row fill': self.tokens / self.slots,
      'FLOPs / peak': self.flops / self.wall / self.peak_flops,
      'process s a step': self.process,
      'wall s a step': self.wall,
    }

  def __str__(self):
    lines = [f'{"":18} {"min":>10} {"median":>10} {"max":>10}']
    for name, values in self.rows().items():
      cells = np.min(values), np.median(values), np.max(values)
      lines.append(f'{name:18} ' + ' '.join(f'{cell:10,.3f}' for cell in cells))
    lines.append(
      f'{"all steps":18} {self.pairs.sum() / self.wall.sum():,.2f} pairs/s,'
      f' {self.tokens.sum() / self.wall.sum():,.1f} real tokens/s, row fill'
      f' {self.tokens.sum() / self.slots.sum():.3f}'
    )
    lines.append(
      f'{"peak":18} {self.peak_flops / 1e9:,.1f} GFLOP/s, of a large matmul'
    )
    lines.append(f'{"peak memory":18} {self.peak_memory / 2**30:,.2f} GiB')
    return '\n'.join(lines)


def real_tokens(group):
  """Tokens of a group, its prompt once."""
  return len(group.prompt) + sum(map(len, group.responses))


def useful_flops(model_config, plan, *, reference):
  """Returns the model FLOPs of each step of `plan`."""
  adapter = None
  if reference == 'adapter_off':
    shapes = jax.eval_shape(lambda: new_adapter(model_config))
    adapter = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  work = accounting.work_of(plan.groups, window=model_config.window)
  return [
    accounting.step_flops(
      model_config,
      accounting.summed(work, numbers),
      live=reference != 'cached',
      adapter=adapter,
    )
    for numbers in plan.steps
  ]


def peak_memory():
  """Most bytes in use so far: of the first device, on a CPU of the process."""
  statistics = jax.local_devices()[0].memory_stats() or {}
  return statistics.get('peak_bytes_in_use') or protocol.peak_memory()


def measure(runs, plan, steps, *, flops, peak_flops):
  """Does so many steps of `plan` after the first; returns {name: Account}.

  Args:
    runs: {name: of `make_run`}; they take turns, step by step.
    plan: see `batches`.
    steps: to be timed.
    flops: {name: useful FLOPs of each step}.
    peak_flops: a second.
  """
  taken = {name: [] for name in runs}
  for number in range(1, steps + 1):
    members = plan.steps[number]
    tokens = sum(real_tokens(plan.groups[g]) for g in members)
    for name, run in runs.items():
      start, process = time.perf_counter(), time.process_time()
      loss = run(number)
      wall = time.perf_counter() - start
      process = time.process_time() - process
      counts = len(members), tokens, plan.slots_of(number), flops[name][number]
      taken[name].append((loss, wall, process, *counts))
  memory = peak_memory()
  return {
    name: Account(*np.array(rows).T, memory, peak_flops)
    for name, rows in taken.items()
  }


def bench(options):
  """Measures each of `options.reference`: ({reference: Account}, plan)."""
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  model_config = dataclasses.replace(
    model_shape(options.shape), dtype=options.dtype, remat=options.remat
  )
  groups = load_groups(options, model_config)
  plan = batches.training_plan(
    groups,
    seed=0,
    num_steps=epoch_steps(groups, options),
    batch_size=options.batch_size,
    row_length=options.row_length,
    multiple=sharding.row_shards(mesh),
    window=model_config.window,
  )
  with sharding.use(mesh):
    runs, flops = {}, {}
    for reference in options.reference:
      runs[reference] = make_run(
        model_config,
        random_parameters(model_config, mesh),
        None,
        plan,
        mesh,
        reference=reference,
        batch_size=options.batch_size,
        chunk=options.chunk,
      )
      runs[reference](0)
      flops[reference] = useful_flops(model_config, plan, reference=reference)
    peak_flops = accounting.measured_peak(mesh, model_config.dtype)
    tracing = contextlib.nullcontext()
    if options.trace:
      tracing = jax.profiler.trace(options.trace)
    with tracing:
      accounts = measure(
        runs, plan, options.steps, flops=flops, peak_flops=peak_flops
      )
    return accounts, plan


def add_arguments(add):
  """Options that this benchmark shares with the one of peers."""
  add('--shape', default=TOY, help='preset or layers/width/heads/vocabulary')
  add('--data', default='uniform', help='uniform, pairs.jsonl or HH folder')
  add('--subset', nargs='+', default=['harmless-base'], help='of HH')
  add('--tokenizer', default='smollm2-135m', help='a model source with one')
  add('--limit', type=int, default=256, help='tokens of prompt, of response')
  add('--batch_size', type=int, default=16, help='pairs a step')
  add('--steps', type=int, default=5, help='timed, after a first one')
  add('--row_length', type=int, default=1024, help='slots of a row')
  add('--chunk', type=int, default=256, help='scored tokens with logits')
  add('--dtype', choices=transformer.DTYPES[:2], default='float32')
  add('--remat', choices=transformer.REMATS, default='none')


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add_arguments(parser.add_argument)
  add = parser.add_argument
  add(
    '--reference',
    choices=REFERENCES,
    nargs='+',
    default=['frozen'],
    help='several take turns, and the peak memory is that of all together',
  )
  add('--trace', default='', help='folder for a trace of jax.profiler')
  options = parser.parse_args()
  accounts, plan = bench(options)
  print(f'{jax.devices()[0].device_kind} x {jax.device_count()}, jax', end=' ')
  print(f'{jax.__version__}, {options.shape}, {options.dtype}')
  print(plan.summary())
  first = accounts[options.reference[0]]
  for reference, account in accounts.items():
    print(f'reference {reference}')
    print(account)
    if account is not first:
      ratio = np.median(first.process / account.process)
      print(f'{"times as fast":18} {ratio:.3f} (process s, median over steps)')


if __name__ == '__main__':
  main()
