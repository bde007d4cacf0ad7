"""Networks and readers that several rewards share, and where their weights come from."""
