"""The commands: options in, one sentence out when something is wrong."""
