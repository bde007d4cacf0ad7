"""Control problems with a known answer, one a file."""
