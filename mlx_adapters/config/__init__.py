"""Settings that several rooms read."""
