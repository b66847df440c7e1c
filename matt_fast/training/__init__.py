"""What rows are trained for, and how."""
