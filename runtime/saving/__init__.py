"""What a run leaves behind: snapshots, scored weights, and the fingerprint that keeps runs apart."""
