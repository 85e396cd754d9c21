"""Command: indexes the items of a pretrained run, and searches them for raw requests."""
