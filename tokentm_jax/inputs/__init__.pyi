"""The public names of this room, and where each lives."""

from .images import Preprocessing as Preprocessing
from .images import Spectrogram as Spectrogram
from .prompts import Prompts as Prompts
from .texts import Tokens as Tokens
from .words import Word as Word
