"""For mypy alone: it cannot see in pyproject.toml which folder is which package, and finds them in their place here."""
