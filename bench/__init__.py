"""Scripts that measure speed, memory and accuracy."""
