"""Do the estimators learn: curves over several task seeds, from the shipped quickstart recipes."""
