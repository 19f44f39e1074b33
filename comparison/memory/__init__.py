"""The memory study: peak activation memory against depth, for local learning and backpropagation."""
