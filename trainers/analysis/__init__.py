"""Looks back at finished runs."""
