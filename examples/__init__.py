"""Pictures, and a tour through the core."""
