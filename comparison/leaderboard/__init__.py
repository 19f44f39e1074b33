"""The leaderboard: rules x networks x data x seeds under one budget, every cell a run of its own."""
