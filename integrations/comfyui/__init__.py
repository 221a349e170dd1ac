"""ComfyUI nodes of ResMaster Pipeline: upscaling by views that follow an image.

ComfyUI imports this folder from `custom_nodes`, under whatever name the folder has there. So the imports within the
folder are relative.
"""

try:
    import resmaster_stages as resmaster_stages
except ModuleNotFoundError as error:
    raise ImportError(
        "the ResMaster nodes need the package resmaster-pipeline; install the folder's requirements.txt with the "
        "Python of ComfyUI"
    ) from error

from .loading import LoadCheckpoint, LoadModel, TakeModel
from .method import ChooseMethod
from .upscaling import Generate, Measure, Upscale
from .views import Captions, CaptionViews, CutViews, ImagePrompts

NODE_CLASS_MAPPINGS = {
    "ResMasterLoadModel": LoadModel,
    "ResMasterLoadCheckpoint": LoadCheckpoint,
    "ResMasterTakeModel": TakeModel,
    "ResMasterMethod": ChooseMethod,
    "ResMasterViews": CutViews,
    "ResMasterCaptions": Captions,
    "ResMasterCaptionViews": CaptionViews,
    "ResMasterImagePrompts": ImagePrompts,
    "ResMasterGenerate": Generate,
    "ResMasterUpscale": Upscale,
    "ResMasterMeasure": Measure,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "ResMasterLoadModel": "Load Model (ResMaster)",
    "ResMasterLoadCheckpoint": "Load Checkpoint (ResMaster)",
    "ResMasterTakeModel": "Take Model (ResMaster)",
    "ResMasterMethod": "Method (ResMaster)",
    "ResMasterViews": "Cut Views (ResMaster)",
    "ResMasterCaptions": "Captions of Views (ResMaster)",
    "ResMasterImagePrompts": "Image Prompts of Views (ResMaster)",
    "ResMasterCaptionViews": "Write Captions of Views (ResMaster)",
    "ResMasterGenerate": "Generate (ResMaster)",
    "ResMasterUpscale": "Upscale (ResMaster)",
    "ResMasterMeasure": "Measure (ResMaster)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
