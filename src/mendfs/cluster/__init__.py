"""What runs on one machine: child processes, their supervisor, and the folder that says what runs."""
