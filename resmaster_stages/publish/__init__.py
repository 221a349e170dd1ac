"""What readers get: manifest, card, report, contact sheets."""
