"""What every task shares: optimizer and schedules, state, loop, checkpoints, logging."""
