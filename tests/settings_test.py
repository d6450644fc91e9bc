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
