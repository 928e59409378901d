"""Yes-or-no questions on what users expect of every torch optimizer, asked of normopt and of other libraries."""
