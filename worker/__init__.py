"""The worker: claims jobs, runs the engine in a child process, publishes what it made."""
