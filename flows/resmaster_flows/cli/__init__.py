"""The command line: one file per verb, with the verb's arguments and what the verb does."""
