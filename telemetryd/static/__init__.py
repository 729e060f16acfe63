"""Files served as they are: the interactive API page and its third-party assets."""
