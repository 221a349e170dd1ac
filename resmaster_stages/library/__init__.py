"""Public functions for scripts and notebooks: `import resmaster_stages as rm` (docs/library.md).

The package may import every other package of `resmaster_stages`. Only the command line and
`integrations` import from it.
"""

from resmaster_stages.library.drawing import upscale_as_configured
from resmaster_stages.library.images import open_image, read_image_file
from resmaster_stages.library.models import single

__all__ = ["open_image", "read_image_file", "single", "upscale_as_configured"]
