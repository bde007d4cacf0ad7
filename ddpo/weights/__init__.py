"""What is trained, averaged and saved."""
