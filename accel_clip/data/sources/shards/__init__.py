"""Pairs in tar shards, on this machine and at addresses."""
