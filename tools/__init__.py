"""Commands for work on the project; the wheel contains none of them."""
