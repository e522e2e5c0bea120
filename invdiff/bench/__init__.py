"""Measured comparisons with peers, each a command that writes a JSON file."""
