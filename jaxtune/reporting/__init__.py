"""What is seen of a run, from its records alone: a file of metrics, other people's trackers, curves, a report."""
