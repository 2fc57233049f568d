"""The command line: parsing only, each sub-command is one call into the package."""
