"""Everything that is written into an artifact, where it is written, and the check of what was written."""
