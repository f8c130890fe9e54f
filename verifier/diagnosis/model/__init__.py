"""Stages 3 to 5 of a diagnosis: the loaded model, its layers and its text."""
