"""The canvas engine: loop, views, fusing, steppers, frequency, patches."""
