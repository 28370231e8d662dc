"""The cost of a step on a device that you need not have."""
