"""`accel-clip check`: what a run will be and whether it can be, before the hours start."""
