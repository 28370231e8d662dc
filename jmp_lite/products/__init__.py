"""Matmuls with a derivative of our own: dimension numbers, rounded operands, the dtype of the result."""
