"""What goes to the Hub, and its card."""
