"""Make the folder `texts` with `transformers`: small random text models, and what it answers; and what it makes of a
few sentences with the real MiniLM of `../shared/data/text`.

    python tests/goldens/make_text_goldens.py    (torch 2.13.0, transformers 5.24.0)

texts/NAME/        a folder as the library writes it, with a tokenizer texts/answers.npz  NAME/outputs: of all texts,
padded to the longest; NAME/ids and NAME/mask; minilm/hidden [tokens, 384]
                   of its sentences, one after the other
texts/texts.json   NAME -> the texts, or pairs of texts
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from make_layout_goldens import LABELS, randomise  # also makes the library importable

import tokenizers  # isort: skip
import transformers as hf  # isort: skip
from safetensors.torch import load_file, save_file  # isort: skip

HERE = Path(__file__).parent / "texts"
SHARED = Path(__file__).resolve().parents[3] / "shared/data/text"
VOCABULARY = ["<s>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY += ["a", "film", "fun", "##ny", "dull", "not", "at", "all", "is", "the", ".", ",", "we", "##ll", "!"]
SIZES = {"vocab_size": len(VOCABULARY), "pad_token_id": 1}
COMMON = {**SIZES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXTS = ["A funny film .", "the film is not well , not dull at all !", "dull"]
PAIRS = [["a film", "is it funny , well"], ["not dull", "fun"]]
SENTENCES = ["a stirring , funny and finally transporting re imagining", "it 's dull .", "Ünïcode 漢字 😀 <b>bold</b>"]


def models() -> dict[str, torch.nn.Module]:
    places = {"max_position_embeddings": 24}
    distil = {**SIZES, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **places}
    return {
        "bert": hf.BertForSequenceClassification(hf.BertConfig(**COMMON, **places, **LABELS)),
        "bert_encoder": hf.BertModel(hf.BertConfig(**COMMON, **places, hidden_act="gelu_new")),
        "roberta": hf.RobertaForSequenceClassification(
            hf.RobertaConfig(**COMMON, max_position_embeddings=26, type_vocab_size=1, **LABELS)
        ),
        "distilbert": hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**distil, **LABELS)),
        "electra": hf.ElectraForSequenceClassification(
            hf.ElectraConfig(**COMMON, **places, embedding_size=8, **LABELS)
        ),
    }


def tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    engine = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    engine.normalizer = tokenizers.normalizers.BertNormalizer()
    engine.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return engine


def padded(engine: tokenizers.Tokenizer, texts: list, pad: int) -> dict[str, torch.Tensor]:
    engine.enable_padding(pad_id=pad)
    encoded = engine.encode_batch([tuple(t) if isinstance(t, list) else t for t in texts])
    engine.no_padding()
    arrays = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: torch.tensor([getattr(e, field) for e in encoded]) for name, field in arrays.items()}


def main() -> None:
    if HERE.exists():
        shutil.rmtree(HERE)
    answers, texts = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, model in models().items():
        randomise(model, generator)
        model.eval()
        folder = HERE / name
        model.save_pretrained(folder)
        for left in folder.glob("*.safetensors"):  # small files, by the names that the library writes
            save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(left).items()}, left)
            model.load_state_dict(load_file(left), strict=False)
        model.float()
        engine = tokenizer()
        engine.save(str(folder / "tokenizer.json"))
        texts[name] = PAIRS if name in ("bert", "electra") else TEXTS
        inputs = padded(engine, texts[name], 1)
        if name == "distilbert":
            del inputs["token_type_ids"]
        if name == "roberta":
            inputs["token_type_ids"] *= 0
        with torch.no_grad():
            found = model(**inputs)
        if name == "bert_encoder":
            mask = inputs["attention_mask"][..., None]
            answers[f"{name}/outputs"] = ((found.last_hidden_state * mask).sum(1) / mask.sum(1)).numpy()
        else:
            answers[f"{name}/outputs"] = found.logits.numpy()
        answers[f"{name}/ids"] = inputs["input_ids"].numpy()
        answers[f"{name}/mask"] = inputs["attention_mask"].numpy().astype(bool)

    mini = hf.BertModel(hf.BertConfig(**json.loads((SHARED / "config.json").read_text()))).eval()
    mini.load_state_dict({k: v.float() for k, v in load_file(SHARED / "minilm_l6.safetensors").items()}, strict=False)
    engine = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizer.json"))
    inputs = padded(engine, SENTENCES, 0)
    with torch.no_grad():
        hidden = mini(**inputs).last_hidden_state
    answers["minilm/hidden"] = hidden[inputs["attention_mask"].bool()].numpy()
    answers["minilm/ids"] = inputs["input_ids"].numpy()
    answers["minilm/mask"] = inputs["attention_mask"].numpy().astype(bool)
    texts["minilm"] = SENTENCES
    np.savez_compressed(HERE / "answers.npz", **answers)
    (HERE / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")


if __name__ == "__main__":
    main()
