"""The tiny models for scripts that have this folder on their path: `import tiny_models`."""

import sys

from helpers import tiny_models

sys.modules[__name__] = tiny_models
