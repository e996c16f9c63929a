"""Writes artifacts: their contents, their place on the disk, and the check of what was written."""
