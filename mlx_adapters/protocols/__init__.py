"""What clients send and are sent: OpenAI's chat, completions, responses and embeddings, and Ollama's."""
