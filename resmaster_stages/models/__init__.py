"""From a model's name to its loaded parts."""
