"""A job's life, and its faces."""
