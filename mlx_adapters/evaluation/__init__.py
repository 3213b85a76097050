"""Loss, KL and task scores on rows; what is held side by side, and what repeated figures say."""
