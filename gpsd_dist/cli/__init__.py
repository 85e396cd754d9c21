"""Names the commands, starts them, and words what they print as the user types it; the standard library alone."""
