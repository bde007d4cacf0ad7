"""What is shown while a run goes on: trackers, pictures, progress, meters."""
