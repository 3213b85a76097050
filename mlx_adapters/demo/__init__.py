"""Whole ways at small size: the embedded example from training to figures, and the self-tests of a device."""
