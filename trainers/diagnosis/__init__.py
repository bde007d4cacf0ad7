"""What happened in a run, by its metrics: findings with numbers, and the key to change."""
