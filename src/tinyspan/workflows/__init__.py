"""The workflows behind the commands: tasks, training, evaluation, export, suggestions."""
