"""`ddpo doctor CONFIG`: minutes on the real model and rewards, before a run that takes days."""
