"""What runs, in which order. Reads like the README's list of stages. Also the command line."""
