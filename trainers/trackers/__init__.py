"""One tracker per file; `trainers.tracking` has the table of them."""
