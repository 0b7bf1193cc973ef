"""What the commands do: tasks, training, evaluation, export, suggestions."""
