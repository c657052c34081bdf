"""What work waits for before it runs: its turn, and room in the budget of the machine."""
