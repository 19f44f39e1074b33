"""A block is what it computes: its operations, traced; what runs together; and the local step that is made of them."""
