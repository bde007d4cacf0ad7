"""Fixed prompts and seeds, scored again and again, and what that says of over-optimisation."""
