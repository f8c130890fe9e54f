"""Stages 1 and 2 of a diagnosis: codes and weights of the container against its source."""
