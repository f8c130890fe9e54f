"""Containers in serving engines: what an engine's own model loader needs of a container."""
