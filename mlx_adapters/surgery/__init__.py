"""Watching and changing the calls inside a model."""
