"""What rounding does: beside float32, by small changes, and between two runs."""
