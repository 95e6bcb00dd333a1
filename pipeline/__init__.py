"""Moonreel's library: a video goes in, descriptions come out. Knows nothing of jobs, HTTP or the environment."""
