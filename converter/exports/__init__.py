"""Container -> a model in another layout."""
