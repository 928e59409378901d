"""Safe arithmetic: lengths, singular values, eigenbases, rounding, and when a number can be read for free."""
