"""The demonstration, and the real models that it and the tests use."""
