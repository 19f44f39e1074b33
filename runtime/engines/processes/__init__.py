"""A worker process per stage, edges between neighbours, control by the coordinator."""
