"""The embedded example: a real model, made-up data, a score, and the whole way from one to the other."""
