"""One run: start, resume, estimate. Exact to the bit when it is stopped and resumed."""
