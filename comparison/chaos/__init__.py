"""A training under faults: does it come to the undisturbed run's bits, what does it cost, and is every cause named?"""
