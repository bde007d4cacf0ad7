"""Scores the images of an epoch in the background, here or in processes of their own."""
