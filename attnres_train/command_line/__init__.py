"""The command line: how its words are read, and the arguments of every command."""
