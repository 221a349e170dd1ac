"""A page in the browser that upscales one image: `resmaster app`. Needs the extra `app`, and no Prefect."""
