"""What only the paper's set-up needs."""
