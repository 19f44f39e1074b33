"""What one stage does: layers, edges, and the loop that executes a stage's actions.

`unlocked.workers.actions` has no need of torch and can be imported without it.
"""
