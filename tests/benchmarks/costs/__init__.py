"""What adaptation costs in time and memory, and what it cannot do without."""
