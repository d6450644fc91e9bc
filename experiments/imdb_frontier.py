"""Controlled sentiment on IMDb: the DPO paper's central figure, one command.

  python -m experiments.imdb_frontier --scale=s --source=official \
      --workdir=runs/imdb

From the labelled reviews to reward against KL of six methods (figure 2 left of
arXiv:2305.18290; section 6.1, appendix C.1). Stages, in their order:

  classifier/         a classifier of sentiment, the reward, and a second judge
                      that nothing is trained on
  base/               a small random model and its tokenizer (scales smoke, s)
  sft.jsonl           beginnings of reviews with their rest; prompts.*.jsonl,
                      of which those of test are measured on
  sft/                the model that has learned to write reviews: the reference
  pairs.jsonl         all pairs of completions.jsonl, the more positive chosen
  reward_model/       the learned reward
  runs/NAME/          see `imdb_scales`
  best_of_n.jsonl     scores of many samples of the SFT model
  temperature.json    the best policies against the reviews' own continuations
  results             what `imdb_results` makes of all this

What is there is not made again, and a stage appears whole or goes on where it
was killed; so the same command goes on after anything. --only=NAME,... makes
some stages or runs, and what they need; --all makes the paper's 22 runs too;
--list shows what there is. A workdir belongs to one scale and one source. Two
commands may make different runs in it at the same time, each on some cores.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import numpy as np

from dpo_jax import fetch
from dpo_jax import names
from dpo_jax import ppo
from dpo_jax import processes
from dpo_jax import sentiment
from dpo_jax import settings
from dpo_jax import train
from dpo_jax import workdirs
from experiments import imdb_gates
from experiments import imdb_results
from experiments import imdb_scales
from experiments import imdb_texts

MISTAKES = (ValueError, FloatingPointError, OSError)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of the way: what it is called, and what must be there before.

  kind: stages of one kind take about as long. done: whether its output is
  there. make: makes it.
  """

  name: str
  kind: str
  needs: tuple[str, ...]
  done: Callable[[], bool]
  make: Callable[[], None]


# --- Training -----------------------------------------------------------------


def finish_run(loop, config, folder, *, said=None, may_diverge=False):
  """Trains in a folder, or goes on there; marks it as finished.

  The mark has what was `said` of the run. Where it `may_diverge`, numbers that
  are not finite end it, and the mark says so.
  """
  stopped = ''
  try:
    loop(settings.Settings(config.to_dict()), str(folder))
  except FloatingPointError as error:
    if not may_diverge:
      raise
    stopped = str(error)
    print(f'{folder.name} ends here: {stopped}')
  workdirs.write(
    str(folder / imdb_results.FINISHED),
    json.dumps({'stopped': stopped, 'settings': said or {}}),
  )


def make_run(run, scale, paths):
  """Trains a run of a scale; one that diverges is a result as any other."""
  finish_run(
    ppo.run if imdb_scales.is_ppo(run) else train.train,
    imdb_scales.run_config(run, scale, paths),
    paths.runs / run.name,
    said=imdb_scales.settings_of(run, scale),
    may_diverge=True,
  )


def make_reward_model(scale, paths):
  """Trains the learned reward, and tells its accuracy."""
  config = imdb_scales.reward_model_config(scale, paths)
  finish_run(train.train, config, paths.reward_model)
  gate = imdb_gates.a15(*imdb_results.read_reward_model(paths.reward_model))
  print(f'reward model: {gate["text"]}')


# --- Order, progress ----------------------------------------------------------


def make_stages(scale, paths, source, runs):
  """Returns the stages in their order.

  Args:
    scale: sizes.
    paths: of the workdir.
    source: of the reviews.
    runs: names of runs.
  """
  reviews = {}  # read when they are needed, once

  def get_reviews():
    if not reviews:
      reviews.update(imdb_texts.read_reviews(source))
    return reviews

  def classify():
    made = sentiment.train(
      source, paths.classifiers, cache_dir=fetch.cache_folder() / 'data'
    )
    print(sentiment.account(made))

  def make_base():
    texts = [text for text, _ in get_reviews()['train']]
    imdb_texts.write_base(scale, texts, paths.base)

  def make_sft():
    config = imdb_scales.sft_config(scale, paths)
    finish_run(train.train, config, paths.sft)

  def stage(name, needs, output, make, *, kind=None):
    return Stage(name, kind or name, needs, output.exists, make)

  finished = imdb_results.FINISHED
  out = [
    stage('classifier', (), paths.judge, classify),  # written last
    stage(
      'sft_rows',
      () if scale.source else ('base',),
      paths.sft_rows,  # written last
      lambda: imdb_texts.write_prompts(scale, get_reviews(), paths),
    ),
    stage('sft', ('sft_rows',), paths.sft / finished, make_sft),
    stage(
      'completions',
      ('classifier', 'sft'),
      paths.completions,
      lambda: imdb_texts.write_completions(scale, paths),
    ),
    stage(
      'pairs',
      ('completions',),
      paths.pairs,
      lambda: imdb_texts.write_pairs(paths),
    ),
    stage(
      'reward_model',
      ('pairs',),
      paths.reward_model / finished,
      lambda: make_reward_model(scale, paths),
    ),
  ]
  if not scale.source:
    out.insert(1, stage('base', (), paths.base, make_base))
  for run in map(imdb_scales.parse, runs):
    out.append(
      stage(
        run.name,
        ('reward_model',) if run.method == 'ppo' else ('pairs',),
        paths.runs / run.name / finished,
        lambda run=run: make_run(run, scale, paths),
        kind=run.method,
      )
    )
  compared = [r for r in runs if imdb_scales.parse(r).method in ('dpo', 'ppo')]
  out += [
    stage(
      'best_of_n',
      ('reward_model',),
      paths.best_of_n,
      lambda: imdb_texts.write_best_of_n(scale, paths),
    ),
    Stage(
      'temperature',
      'temperature',
      tuple(compared),
      lambda: imdb_texts.temperature_is_current(paths),
      lambda: imdb_texts.write_temperature(scale, paths),
    ),
    Stage(
      'results',
      'results',
      (),
      lambda: imdb_results.is_current(paths),
      lambda: print(imdb_results.write(scale, paths)),
    ),
  ]
  return out


def needed(stages, wanted):
  """Returns the stages of those names and those that they need, in order."""
  by_name = {stage.name: stage for stage in stages}
  found, open_ = set(), list(wanted)
  while open_:
    stage = names.look_up(by_name, 'stage or run', open_.pop())
    if stage.name not in found:
      found.add(stage.name)
      open_ += stage.needs
  return [stage for stage in stages if stage.name in found]


def remaining(left, times):
  """Tells the time that stages will take, by finished ones of their kind.

  Args:
    left: stages.
    times: {name: {'kind', 'seconds'}} of finished ones.
  """
  known = collections.defaultdict(list)
  for entry in times.values():
    known[entry['kind']].append(entry['seconds'])
  seconds = sum(np.mean(known[s.kind]) for s in left if s.kind in known)
  new = sum(s.kind not in known for s in left)
  if new == len(left):
    return 'nobody knows how long'
  text = f'about {seconds / 60:.1f} min'
  return f'{text}, and {new} of kinds not seen yet' if new else text


def run(scale, paths, source, *, runs, only):
  """Makes what is not there yet, and tells how far it is.

  Args:
    scale: of `imdb_scales.SCALES`.
    paths: `imdb_scales.Paths`.
    source: of the reviews: official, or a folder.
    runs: names of runs.
    only: names of stages and runs; (): all.
  """
  stages = make_stages(scale, paths, source, runs)
  if only:
    stages = needed(stages, only)
  claim(scale, paths, source)
  check_settings(scale, paths, runs)
  with processes.heed_sigterm():
    for number, stage in enumerate(stages, start=1):
      if stage.done():
        continue
      processes.poll()
      times = read_times(paths)
      left = [s for s in stages[number - 1 :] if not s.done()]
      print(
        f'[{number}/{len(stages)}] {stage.name}; {len(left)} stages left,'
        f' {remaining(left, times)}',
        flush=True,
      )
      start = time.perf_counter()
      try:
        # Others may make other stages of this workdir at the same time.
        with workdirs.held(str(paths.making / stage.name)):
          stage.make()
      finally:  # what a stage took before it was stopped counts too
        times = read_times(paths)
        before = times.get(stage.name, {'seconds': 0.0})['seconds']
        seconds = time.perf_counter() - start + before
        times[stage.name] = {'kind': stage.kind, 'seconds': seconds}
        if not stage.done():
          times[stage.name]['kind'] = 'unfinished'
        workdirs.write(str(paths.times), json.dumps(times, indent=1))
      print(f'[{number}/{len(stages)}] {stage.name} took {seconds:.1f} s')


def check_runs(runs, stages):
  """Raises, naming the stages too, where a name is none of a run."""
  for name in runs:
    try:
      imdb_scales.parse(name)
    except ValueError as error:
      raise ValueError(f'{error}; stages are {", ".join(stages)}') from error


def read_times(paths):
  """Returns {stage: {'kind', 'seconds'}}; `unfinished` is a kind too."""
  return json.loads(paths.times.read_text()) if paths.times.exists() else {}


def claim(scale, paths, source):
  """Refuses a workdir whose data are of another scale or source."""
  paths.root.mkdir(parents=True, exist_ok=True)
  path = paths.root / 'scale.json'
  if source != 'official':
    source = str(pathlib.Path(source).expanduser().absolute())
  now = json.loads(json.dumps(scale.as_data() | {'source': source}))
  if path.exists():
    before = json.loads(path.read_text())
    changed = [
      f'{name}: {before.get(name)!r} -> {value!r}'
      for name, value in now.items()
      if before.get(name) != value
    ]
    if changed:
      raise ValueError(
        f'{paths.root} has data of another scale or source'
        f' ({", ".join(changed)}); use another --workdir'
      )
  else:
    workdirs.write(str(path), json.dumps(now, indent=1))


def check_settings(scale, paths, runs):
  """Refuses finished runs of other settings than the scale has now."""
  for run in map(imdb_scales.parse, runs):
    path = paths.runs / run.name / imdb_results.FINISHED
    said = json.loads(path.read_text()).get('settings') if path.exists() else {}
    now = json.loads(json.dumps(imdb_scales.settings_of(run, scale)))
    changed = [
      f'{name}: {said.get(name)!r} -> {now.get(name)!r}'
      for name in sorted({*(said or {}), *now})
      if said and said.get(name) != now.get(name)
    ]
    if changed:
      raise ValueError(
        f'{path.parent} was made with other settings ({", ".join(changed)});'
        ' remove it, and it will be made again, or use another --workdir'
      )


def main(arguments=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('--scale', choices=imdb_scales.SCALES, required=True)
  add('--source', default='official', help='of the reviews, or a folder')
  add('--workdir', required=True)
  add('--only', default='', help='stages and runs, with commas between')
  add('--all', action='store_true', help="the paper's 22 runs too")
  add('--traceback', action='store_true', help='show where an error arose')
  add('--list', action='store_true', help='show stages, make nothing')
  options = parser.parse_args(arguments)
  scale = imdb_scales.SCALES[options.scale]
  paths = imdb_scales.Paths(options.workdir)
  only = [name for name in options.only.split(',') if name]
  runs = list(scale.runs)
  if options.all:
    runs += [name for name in imdb_scales.FULL if name not in runs]
  try:
    known = [s.name for s in make_stages(scale, paths, options.source, runs)]
    runs += [name for name in only if name not in known]
    check_runs(runs, known)
    if options.list:
      for stage in make_stages(scale, paths, options.source, runs):
        print('done' if stage.done() else 'left', stage.name)
      return
    run(scale, paths, options.source, runs=runs, only=only)
  except processes.Preempted as stop:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f'imdb_frontier: {stop.what}; start it again', file=sys.stderr)
    raise
  except MISTAKES as error:
    if options.traceback:
      raise
    sys.exit(f'imdb_frontier: {error}  (--traceback shows where)')


if __name__ == '__main__':
  main()
