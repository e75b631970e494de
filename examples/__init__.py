"""Example pictures, a tour of the core, and scripts that write data sets, a figure and a page."""
