"""What lies on the disk, written whole or not at all."""
