"""Photos, recordings and labelled examples, read from untrusted files."""
