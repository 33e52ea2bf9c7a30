"""The public names, and where each lives."""

from . import configs as configs
from . import inputs as inputs
from . import maths as maths
from . import metrics as metrics
from . import models as models
from .cli.show import show as show
from .configs import EvaluateConfig as EvaluateConfig
from .configs import Row as Row
from .errors import InputError as InputError
from .inputs.words import words as words
from .maths import scores as scores
from .maths import weights as weights
from .maths.maps import combine as combine
from .maths.maps import to_pixels as to_pixels
from .maths.variants import Blocks as Blocks
from .maths.variants import TokenTM as TokenTM
from .methods.amortised import amortised as amortised
from .methods.answers import Reasons as Reasons
from .methods.answers import explain_words as explain_words
from .methods.explain import explain as explain
from .methods.explain import explain_fn as explain_fn
from .methods.explain import inspect as inspect
from .methods.explain import methods_for as methods_for
from .methods.table import METHODS as METHODS
from .methods.table import Method as Method
from .models.loading import Model as Model
from .models.loading import load as load
from .programs.capture import Trace as Trace
from .programs.capture import capture as capture
from .runs.dataset import explain_dataset as explain_dataset
from .runs.evaluate import evaluate as evaluate
from .runs.explainer import Explainer as Explainer
from .runs.export import export_maps as export_maps
from .runs.leaderboard import LeaderboardConfig as LeaderboardConfig
from .runs.leaderboard import leaderboard as leaderboard
from .runs.report import compare as compare
from .runs.store import open_maps as open_maps
from .samples import sample_data as sample_data

__version__: str
