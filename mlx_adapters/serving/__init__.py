"""OpenAI's protocol over one base and many adapters."""
