"""What `accel-clip` does beside training, a module a command."""
