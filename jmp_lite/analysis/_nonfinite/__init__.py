"""Who made the first NaN or infinity."""
