"""Who tells whom: the coordinator, its clients, their messages, windows of the stream, failures. No torch."""
