"""A step that is computed beside the cache gives what the model gives, and the cache gets what it holds."""

import pytest

from helpers.tiny_models import tiny_model
