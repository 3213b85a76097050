"""Text decides how to round, and judges it."""
