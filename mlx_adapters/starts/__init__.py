"""What a fresh adapter starts as, where that is more than zero."""
