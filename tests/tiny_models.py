"""The tiny models for scripts that have this folder on their path: `import tiny_models`."""

from helpers.tiny_models import *  # noqa: F403
