"""Installs dpo_jax and the `dpo-jax` command."""

import setuptools

setuptools.setup(
  name='dpo_jax',
  version='0.1.0',
  description='Direct Preference Optimization in JAX',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['dpo_jax', 'dpo_jax.*']),
  package_data={'dpo_jax.data': ['*.json']},
  install_requires=[
    'absl-py>=2.1',
    'array-record>=0.6',
    'flax>=0.12',
    'gguf>=0.17',
    'huggingface_hub>=0.34',  # of tokenizers too
    'importlib-resources>=6.4',  # tensorflow-datasets needs it
    'jax>=0.10',
    'jinja2>=3.1.6',
    'matplotlib>=3.9',
    'ml-collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12',
    'safetensors>=0.5',
    'scipy>=1.13',  # JAX needs it too
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.8',
    'tokenizers>=0.22',
    'tqdm>=4.66',
    'vaderSentiment>=3.3.2',
  ],
  extras_require={
    'test': ['pytest>=8.0', 'pytest-xdist>=3.6', 'ruff>=0.17,<0.18'],
    'tpu': ['jax[tpu]>=0.10'],  # with the libtpu that it was made for
  },
  entry_points={'console_scripts': ['dpo-jax = dpo_jax.main:run']},
)
