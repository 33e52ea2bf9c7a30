"""Photos and labelled examples: read from files that nobody has checked, and cut to what a model sees."""
