"""Pictures and tables. No library is needed for any of them."""
