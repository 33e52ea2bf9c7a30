"""What computes for long, keeps what is done, and resumes where it stopped."""
