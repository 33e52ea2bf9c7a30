"""What computes for long, keeps what is done, and goes on where it stopped."""
