"""What a step costs on a device that need not be there."""
