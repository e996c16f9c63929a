"""Jinja2 sources of everything that the compiler writes."""
