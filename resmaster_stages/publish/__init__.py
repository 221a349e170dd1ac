"""Publishes a dataset for its readers: manifest, dataset card, report, contact sheets."""
