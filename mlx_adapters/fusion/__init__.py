"""Adapter into base weights: fuse, quantize with little loss, and measure what was lost."""
