"""A stock diffusers pipeline, understood: traced, called, encoded and decoded with, without an adapter for each."""
