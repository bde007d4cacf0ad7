"""From scores to what a step is worth: baselines, cost-to-go, shaping, multipliers."""
