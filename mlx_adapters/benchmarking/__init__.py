"""Measure variants of a model fairly: fresh processes, shuffled blocks, ratios with intervals, a report."""
