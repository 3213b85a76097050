"""Numbers to few bits: pure functions on arrays."""
