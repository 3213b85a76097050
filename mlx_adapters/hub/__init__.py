"""Publish to the Hugging Face Hub and take from it, with model cards made from metadata."""
