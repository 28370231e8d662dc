"""The origin of the first NaN or infinity."""
