"""What a run says: records, the sinks that receive them, the reporter that makes them, dashboard and logs."""
