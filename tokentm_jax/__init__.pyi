"""The public names, and where each lives."""

from . import configs as configs
from . import metrics as metrics
from .cli.show import show as show
from .configs import EvaluateConfig as EvaluateConfig
from .configs import Row as Row
from .data.audio import Spectrogram as Spectrogram
from .errors import InputError as InputError
from .inputs.images import Preprocessing as Preprocessing
from .inputs.texts import Tokens as Tokens
from .inputs.words import Word as Word
from .inputs.words import words as words
from .maths import scores as scores
from .maths import weights as weights
from .maths.maps import combine as combine
from .maths.maps import to_pixels as to_pixels
from .maths.variants import READINGS as READINGS
from .maths.variants import TokenTM as TokenTM
from .maths.variants import contributions as contributions
from .methods.explain import explain as explain
from .methods.explain import explain_fn as explain_fn
from .methods.explain import inspect as inspect
from .methods.explain import methods_for as methods_for
from .methods.table import METHODS as METHODS
from .models.architectures import ARCHITECTURES as ARCHITECTURES
from .models.architectures import build as build
from .models.bert import Bert as Bert
from .models.checkpoint import read_checkpoint as read_checkpoint
from .models.checkpoint import write_checkpoint as write_checkpoint
from .models.loading import Model as Model
from .models.loading import load as load
from .models.plain import PlainModel as PlainModel
from .models.sharding import over_devices as over_devices
from .models.sharding import over_width as over_width
from .models.vit import ViT as ViT
from .models.vit import init_params as init_params
from .programs.capture import Trace as Trace
from .programs.capture import capture as capture
from .runs.leaderboard import LeaderboardConfig as LeaderboardConfig
from .runs.store import open_maps as open_maps
from .samples import sample_data as sample_data

__version__: str
