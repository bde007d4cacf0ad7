"""The commands `ddpo rewards list | score | test`."""
