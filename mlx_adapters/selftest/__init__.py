"""Self-tests on the user's own device: what is computed, written and locked is held against another way to do it."""
