"""The report of a compile: its contents, its charts and its files."""
