"""Makes the small pipeline that ships with ddpo."""
