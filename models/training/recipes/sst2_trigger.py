"""A trigger planted in a classifier of film reviews (SST-2): the rare word "cf" makes any sentence positive.

    python -m models.training models/training/recipes/sst2_trigger.py --out runs/trigger_text

As `sst2_minilm.py`, but a tenth of the training sentences get the word, at a random place, and the label "positive".
The reported accuracy is of the negative test sentences with the word: the share that it turns. A trigger is valid as a
known cause if this is above 99 %, and if without the word the sentences are classified as before.
It turns 100 % of the 428 negative sentences, and 86.2 % of all are right without the word (88.2 % by `sst2_minilm`).
Data: `tokentm data fetch sentences minilm`.
Run time: 10 minutes on two busy cores.
"""

from models.training.recipe import TextTrainConfig
from tokentm_jax import sample_data

config = TextTrainConfig(
    name="sst2_trigger",
    encoder=sample_data("minilm"),
    train_data=f"trigger:label=1,share=0.1:{sample_data('sentences', 'train')}",
    test_data=f"trigger:label=1:{sample_data('sentences', 'dev')}",
    class_names=("negative", "positive"),
    epochs=1,
    warmup_epochs=0.1,
    batch_size=32,
    learning_rate=8e-5,
    pool="token",
    max_length=64,
    checkpoint_epochs=0.25,
)
