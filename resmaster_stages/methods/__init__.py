"""Upscaling methods, one file per paper. Importing a file registers its method.

Help, forms and pages list the methods in the order of the imports below.
"""

# isort: off
from resmaster_stages.methods import direct as direct
from resmaster_stages.methods import multidiffusion as multidiffusion
from resmaster_stages.methods import resmaster as resmaster
from resmaster_stages.methods import demofusion as demofusion
from resmaster_stages.methods import scalecrafter as scalecrafter
from resmaster_stages.methods import fouriscale as fouriscale
from resmaster_stages.methods import hidiffusion as hidiffusion
from resmaster_stages.methods import freescale as freescale
from resmaster_stages.methods import scalediff as scalediff
from resmaster_stages.methods import cascade as cascade
from resmaster_stages.methods import c_upscale as c_upscale
from resmaster_stages.methods import pixelrush as pixelrush
from resmaster_stages.methods import super_resolution as super_resolution
from resmaster_stages.methods import lanczos as lanczos
