"""Example pictures, a tour of the core, and scripts that write a data set, a figure and a page."""
