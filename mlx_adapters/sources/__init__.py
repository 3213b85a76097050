"""What a reference means: an adapter, a base, a repository on the Hub."""
