"""Chat templates: what a base's own takes, and renderings that say where their characters came from."""
