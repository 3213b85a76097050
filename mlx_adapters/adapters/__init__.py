"""The adapters one has: kept, seen, packed, in and out."""
