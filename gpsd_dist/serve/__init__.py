"""Command: answers scoring requests over HTTP."""
