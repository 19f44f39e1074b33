"""The comparison of local learning with backpropagation: contenders, how they are measured, and what comes out."""
