"""The embedded default: a small world with its data and two small base models."""
