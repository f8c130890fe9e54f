"""The diagnosis as an HTML page."""
