"""The effect of rounding: against float32, by small changes, and between two runs."""
