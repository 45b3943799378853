"""What tests share: commands as a user runs them, pictures and data, servers, processes, and how results compare."""
