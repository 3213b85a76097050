"""Adapters at work inside layers."""
