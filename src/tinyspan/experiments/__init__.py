"""Whole experiments: tasks, runs, the demo, its figures and its page."""
