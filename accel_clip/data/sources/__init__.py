"""Where pairs come from: tables, folders, `datasets` and the built-in demo."""
