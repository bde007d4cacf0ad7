"""The catalogue, one scorer a file."""
