import pytest

from dpo_jax import settings


def test_unread_keys_are_named():
  config = settings.Settings({'a': 1, 'b': {'c': 2, 'd': {'e': 3, 'f': 4}}})
  assert config.a == 1 and config['b'].d.e == 3
  assert config.unread() == ['b.c', 'b.d.f']
  with pytest.raises(ValueError, match=r'nothing reads: b\.c, b\.d\.f'):
    config.check_all_read()
  config.check_all_read(but='b')


def test_splatting_reads_a_section():
  config = settings.Settings({'b': {'c': 2, 'd': 3}})
  assert dict(**config.b) == {'c': 2, 'd': 3}
  config.check_all_read()


def test_showing_is_not_reading():
  config = settings.Settings({'a': 1, 'b': {'c': 2}})
  assert config.as_dict() == {'a': 1, 'b': {'c': 2}}
  assert config.unread() == ['a', 'b.c']


def test_a_missing_key_names_those_there_are():
  with pytest.raises(AttributeError, match=r"no key 'lr' here.*\['a', 'b'\]"):
    _ = settings.Settings({'a': 1, 'b': 2}).lr


def test_all_numbers_out_of_their_ranges_are_named():
  config = settings.Settings({'a': 0, 'b': {'c': float('nan'), 'd': 1.0}})
  ranges = {
    'a': '1 or more',
    'b.c': 'a number from 0 to 1',
    'b.d': 'a number from 0 to 1',
  }
  with pytest.raises(ValueError) as caught:
    settings.check_numbers(config, ranges)
  assert str(caught.value).split('\n') == [
    'a is 0; use 1 or more',
    'b.c is nan; use a number from 0 to 1',
  ]
  settings.check_numbers(config, {'a': '0 or more', 'b.d': '0 or more'})


@pytest.mark.parametrize('words', settings.NUMBERS)
def test_no_range_has_nan_infinity_or_minus_one(words):
  for value in (float('nan'), float('inf'), -1.0):
    assert not settings.NUMBERS[words](value)
