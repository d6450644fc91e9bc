"""Reports: literal text, and pictures that hold what they were given."""

import matplotlib.figure
import matplotlib.image
import pytest

from dpo_jax import report


@pytest.fixture
def figures(monkeypatch):
  """The figures saved during a test."""
  saved = []
  save = matplotlib.figure.Figure.savefig

  def keep(figure, path):
    saved.append(figure)
    save(figure, path)

  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', keep)
  return saved


def test_frontier_shows_every_point_and_labels_start_and_end(figures, tmp_path):
  points = [
    {'kl': 0.0, 'reward': 0.1, 'reward_se': 0.05},
    {'kl': 4.0, 'reward': 0.4, 'reward_se': 0.04, 'kl_se': 0.3},
    {'kl': 9.0, 'reward': 0.6},
  ]
  report.frontier_png(points, tmp_path / 'a.png', reward='VADER')
  assert matplotlib.image.imread(tmp_path / 'a.png').std() > 0
  (axis,) = figures[0].axes
  assert axis.lines[0].get_xydata().tolist() == [[0, 0.1], [4, 0.4], [9, 0.6]]
  assert [t.get_text() for t in axis.texts] == ['start', '', 'end']
  assert axis.get_ylabel() == 'VADER'
  with pytest.raises(ValueError, match='at least one point'):
    report.frontier_png([], tmp_path / 'b.png')


def test_lines_have_their_points_and_bars_of_two_errors(figures, tmp_path):
  panels = {
    'loss': {'a': [(1.0, 5.0, 0.5), (2.0, 7.0, None)], 'b': [(2.0, 1.0, None)]},
    'reward': {'b': [(0.5, 3.0, None), (5.0, 4.0, None)]},
  }
  report.lines_png(panels, tmp_path / 'a.png', xlabel='beta')
  assert matplotlib.image.imread(tmp_path / 'a.png').std() > 0
  loss, reward = figures[0].axes
  assert [axis.get_title(loc='left') for axis in (loss, reward)] == [*panels]
  assert loss.get_xlabel() == 'beta'
  a, b = loss.containers
  assert a.lines[0].get_xydata().tolist() == [[1, 5], [2, 7]]
  assert b.lines[0].get_xydata().tolist() == [[2, 1]]
  bars = [s.tolist() for s in a.lines[2][0].get_segments()]
  assert bars == [[[1, 4], [1, 6]], [[2, 7], [2, 7]]]
  assert 'two standard errors' in loss.get_title(loc='right')
  assert reward.get_title(loc='right') == ''  # it has no bars
  assert (loss.get_xscale(), reward.get_xscale()) == ('linear', 'log')
  ticks = [label.get_text() for label in reward.get_xticklabels()]
  assert ticks == ['0.5', '5']
  # A series looks the same in every panel.
  assert (
    reward.lines[0].get_color()
    == b.lines[0].get_color()
    != a.lines[0].get_color()
  )
  (legend,) = figures[0].legends
  assert [text.get_text() for text in legend.get_texts()] == ['a', 'b']
  with pytest.raises(ValueError, match='at least one panel'):
    report.lines_png({}, tmp_path / 'b.png', xlabel='beta')


def test_lines_beyond_ten_differ_from_all_before():
  styles = [tuple(report._style(i).values()) for i in range(20)]
  assert len(set(styles)) == 20


def test_a_markdown_table_is_aligned_and_keeps_bars():
  rows = [('loss', 'mean'), ('dpo', '1 ± 2'), ('a|b', '-')]
  assert report.markdown_table(rows) == (
    '| loss | mean  |\n| ---- | ----- |\n| dpo  | 1 ± 2 |\n| a\\|b | -     |\n'
  )


def test_curves_draw_each_key_where_it_was_recorded(figures, tmp_path):
  records = [
    {'step': 1, 'train/loss': 0.7},
    {'step': 2, 'train/loss': 0.5, 'test/reward': 0.2, 'test/reward_se': 0.1},
    {'step': 3, 'train/loss': 0.4},
    {'step': 4, 'test/reward': 0.3, 'test/reward_se': 0.1},
  ]
  keys = ['train/loss', 'test/reward', 'never/recorded']
  report.curves_png(records, tmp_path / 'a.png', keys=keys)
  assert matplotlib.image.imread(tmp_path / 'a.png').std() > 0
  loss, reward = figures[0].axes
  assert loss.get_title(loc='left') == 'train/loss'
  assert loss.lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.5], [3, 0.4]]
  assert not loss.collections
  assert reward.lines[0].get_xydata().tolist() == [[2, 0.2], [4, 0.3]]
  band = reward.collections[0].get_paths()[0].get_extents()
  assert (band.y0, band.y1) == pytest.approx((0.0, 0.5))
  with pytest.raises(ValueError, match='nothing to draw'):
    report.curves_png(records, tmp_path / 'b.png', keys=['never/recorded'])


def test_a_long_curve_gets_its_running_mean(figures, tmp_path):
  records = [{'step': i, 'x': float(i % 2)} for i in range(40)]
  report.curves_png(records, tmp_path / 'a.png', keys=['x'])
  mean = figures[0].axes[0].lines[1].get_ydata()
  assert mean[:3].tolist() == pytest.approx([0, 1 / 2, 1 / 3])
  assert mean[3:].tolist() == pytest.approx([0.5] * 37)


def test_text_table_wraps_both_sides_and_shows_rewards():
  table = report.text_table(
    [
      {
        'prompt': 'The plot is',
        'before': ' dull and\nslow to begin.',
        'after': ' great',
        'before_reward': -0.4,
        'after_reward': 0.625,
      },
      {
        'prompt': 'It',
        'before': '',
        'after': 'x',
        'before_reward': 0,
        'after_reward': 0,
      },
    ],
    width=31,
  )
  assert table == (
    '===============================\n'
    'The plot is\n'
    '-------------------------------\n'
    'before -0.40   | after +0.62\n'
    'dull and slow  | great\n'
    'to begin.      |\n'
    '===============================\n'
    'It\n'
    '-------------------------------\n'
    'before +0.00   | after +0.00\n'
    '(empty)        | x\n'
    '===============================\n'
  )


def test_summary_aligns_values_errors_and_changes():
  text = report.summary(
    {'reward': 0.1, 'reward_se': 0.02, 'length': 30.0},
    {'reward': 0.45, 'reward_se': 0.03, 'kl': 12.345, 'length': 28.5},
  )
  assert text == (
    '                              before           after  change\n'
    'mean reward           +0.100 ± 0.020  +0.450 ± 0.030  +0.350\n'
    'sequence KL (nats)                 -           12.35       -\n'
    'mean length (tokens)            30.0            28.5    -1.5\n'
  )
