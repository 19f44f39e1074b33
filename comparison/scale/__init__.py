"""Pipelines of very many stages on paper: throughput, failures, memory and messages, by simulation and formula."""
