"""The stream as arithmetic, the schedule as data, partition and simulation. No torch."""
