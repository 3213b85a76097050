"""What llama.cpp reads: its architectures, its names, its blocks of few bits, its tokenizers."""
