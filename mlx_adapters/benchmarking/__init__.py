"""Speed and memory of variants, measured and reported."""
