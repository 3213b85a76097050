"""An OpenAI-compatible server for one base and many adapters."""
