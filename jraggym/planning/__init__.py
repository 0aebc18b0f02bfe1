"""What a job needs of an accelerator, found on a machine without one: its real programs, compiled ahead of time."""
