"""What is in an answer, and what may be in it: reasoning and tool calls told apart, grammars on the logits."""
