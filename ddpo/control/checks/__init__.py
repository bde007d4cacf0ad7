"""The checks that `ddpo verify` runs, one module for each subject; each exports `CHECKS`."""
