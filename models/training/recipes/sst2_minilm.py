"""Fine-tune MiniLM as a classifier of film reviews (SST-2): a text model of one's own in 20 minutes.

    python -m models.training models/training/recipes/sst2_minilm.py --out runs/sst2_minilm
    tokentm explain "a stirring, funny film" --model runs/sst2_minilm

The encoder is sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0). The result is made from foreign weights and is not
part of the project; nor are the sentences, which have no licence. Meant for 88 % or more on `sst2_dev.tsv`.
Data: `tokentm data fetch sentences minilm`.
"""

from models.training.recipe import TextTrainConfig
from tokentm_jax import sample_data

config = TextTrainConfig(
    name="sst2_minilm",
    encoder=sample_data("minilm"),
    train_data=sample_data("sentences", "train"),
    test_data=sample_data("sentences", "dev"),
    class_names=("negative", "positive"),
    epochs=3,
    batch_size=32,
    learning_rate=8e-5,
    pool="token",
    max_length=64,
)
