"""The canvas engine: denoising loop, views, fusing, steppers, frequency filters, patches of the UNet."""
