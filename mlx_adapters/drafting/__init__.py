"""Speculative decoding: some tokens are guessed, and one step of the model checks them all."""
