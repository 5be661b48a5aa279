"""`lab-audio dead`."""
