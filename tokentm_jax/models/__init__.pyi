"""The public names of this room, and where each lives."""

from .architectures import ARCHITECTURES as ARCHITECTURES
from .architectures import build as build
from .bert import Bert as Bert
from .checkpoint import read_checkpoint as read_checkpoint
from .checkpoint import write_checkpoint as write_checkpoint
from .decoder import Decoder as Decoder
from .generation import generate as generate
from .plain import PlainModel as PlainModel
from .sharding import over_devices as over_devices
from .sharding import over_width as over_width
from .vision_decoder import VisionDecoder as VisionDecoder
from .vit import ViT as ViT
from .vit import init_params as init_params
