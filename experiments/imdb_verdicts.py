"""stub."""


def write(study, folder, paths):
  del study, folder, paths
  return ''
