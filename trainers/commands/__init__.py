"""The subcommands of `ddpo`, by what they are about; `trainers.cli` puts them together."""
