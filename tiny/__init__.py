"""The small world: a toy data set and two base models, used if no others are there."""
