"""Pairs in the rows of tables, of every format that people have."""
