"""One small function per finding, by subject. Each takes what it looks at and gives Found or None."""
