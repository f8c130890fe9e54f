"""Arguments of public functions: checked by their names, before any work is done."""
