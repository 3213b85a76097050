"""Files to rows, rows to tokens and masks, tokens to batches."""
