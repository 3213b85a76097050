"""Keys and values of text that was read, kept so that it is not read again."""
