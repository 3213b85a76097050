"""One fuse, from request to result."""
