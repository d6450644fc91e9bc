"""First words of movie reviews, neutral in sentiment, written for this project.

A policy continues them; `{'train': [...], 'test': [...]}`, all different.
"""

import importlib.resources
import json


def openings():
  """Returns the openings by split."""
  file = importlib.resources.files('dpo_jax.data') / 'openings.json'
  return json.loads(file.read_text(encoding='utf-8'))
