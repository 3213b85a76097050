"""Bases and adapters as objects; their layers; loading."""
