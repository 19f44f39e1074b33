"""Backpropagation as the best rival: its pipeline schedules, executed, and the forms in which it is measured."""
