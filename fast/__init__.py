"""The same numbers as the plain code, sooner or in less memory."""
