"""Pairs in folders of pictures."""
