"""Recurrent models of English text that ships with Python: the topics of ``help()``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import training

TEXT_CHARACTERS = 120_000


def text() -> str:
    """The beginning of the topics, in the order of their names: ASCII, without rules, each gap one space."""
    from pydoc_data.topics import topics

    joined = " ".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", re.sub(r"([*=~-])\1+", "", joined))[:TEXT_CHARACTERS]


class Characters(nn.Module):
    """Characters [T, B] -> logits of the next ones [T, B, vocabulary], and the state to go on with."""

    def __init__(self, layer: type[nn.RNNBase], vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.recurrent = layer(32, 128)
        self.logits = nn.Linear(128, vocabulary)

    def forward(self, characters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.recurrent(self.embedding(characters), state)
        return self.logits(hidden), state


class CharacterModel(training.Task):
    """Names the next character; trained by truncated backpropagation through time."""

    epochs, clip = 1, 1.0
    streams, steps = 32, 40  # texts side by side, characters between updates

    def __init__(self, layer: type[nn.RNNBase], least: float, device: torch.device) -> None:
        self.layer, self.accuracy = layer, least
        self.title = f"characters of English: {layer.__name__}"
        self.file = f"characters-{layer.__name__.lower()}"
        written = text()
        self.alphabet = sorted(set(written))
        codes = torch.tensor([self.alphabet.index(character) for character in written], device=device)
        held_out = len(codes) // 10
        self.train, self.test = codes[held_out:], codes[:held_out]

    def model(self) -> nn.Module:
        return Characters(self.layer, len(self.alphabet))

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=5e-3)

    def batches(self, epoch: int) -> list[Tensor]:
        """[steps + 1, streams]: each stream goes on where it was."""
        length = len(self.train) // self.streams
        streams = self.train[: length * self.streams].view(self.streams, length).t()
        return [streams[start : start + self.steps + 1] for start in range(0, length - self.steps, self.steps)]

    def loss(self, model: nn.Module, batch: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(batch[:-1], state)
        detached = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
        return F.cross_entropy(logits.flatten(0, 1), batch[1:].flatten()), detached

    def score(self, model: nn.Module) -> float:
        logits, _ = model(self.test[:-1, None])
        return float((logits[:, 0].argmax(1) == self.test[1:]).double().mean())

    def show(self, model: nn.Module) -> str:
        """What it writes after "The "."""
        generator, state = torch.Generator().manual_seed(0), None
        codes = [self.alphabet.index(character) for character in "The "]
        given = codes
        for _ in range(120):
            logits, state = model(torch.tensor(given, device=self.test.device)[:, None], state)
            chances = (logits[-1, 0].double() / 0.6).softmax(0).cpu()
            given = [int(torch.multinomial(chances, 1, generator=generator))]
            codes += given
        return "".join(self.alphabet[code] for code in codes)


class Attention(nn.Module):
    """Encodes a word [T, B] by an LSTM and decodes another, looking at all of the first (Luong et al., 2015)."""

    def __init__(self, letters: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, 32)
        self.encoder = nn.LSTM(32, size // 2, bidirectional=True)
        self.decoder = nn.LSTM(32, size)
        self.query = nn.Linear(size, size, bias=False)
        self.hidden = nn.Linear(2 * size, size)
        self.logits = nn.Linear(size, letters)
        self.criterion = nn.CrossEntropyLoss(ignore_index=Translation.pad)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """source [S, B] with lengths [B] (on the CPU), target [T, B] -> logits [T, B, letters]."""
        embedded = nn.utils.rnn.pack_padded_sequence(self.embedding(source), lengths, enforce_sorted=False)
        packed, (h, c) = self.encoder(embedded)
        memory, _ = nn.utils.rnn.pad_packed_sequence(packed, total_length=len(source))
        state = tuple(part.transpose(0, 1).flatten(1)[None] for part in (h, c))
        decoded, _ = self.decoder(self.embedding(target), state)
        scores = torch.einsum("tbd,sbd->bts", self.query(decoded), memory)
        absent = torch.arange(len(source))[None] >= lengths[:, None]
        weights = scores.masked_fill(absent[:, None].to(scores.device), -torch.inf).softmax(2)
        context = torch.einsum("bts,sbd->tbd", weights, memory)
        logits: Tensor = self.logits(torch.tanh(self.hidden(torch.cat([decoded, context], 2))))
        return logits


@dataclass
class Words:
    """Words and their translations, padded: [S, B], lengths [B], [T, B]."""

    source: Tensor
    lengths: Tensor
    target: Tensor


class Translation(training.Task):
    """Turns English words into Pig Latin: ``string`` -> ``ingstray``, ``apple`` -> ``appleway``."""

    title, file = "words to Pig Latin: LSTM, attention", "translation"
    epochs, accuracy, clip, batch = 10, 0.8, 1.0, 64
    begin, end, pad = 0, 1, 28  # codes besides the letters' 2 to 27

    def __init__(self, device: torch.device) -> None:
        self.device = device
        words = sorted({word for word in re.findall(r"[a-z]+", text().lower()) if 3 <= len(word) <= 10})
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
        words = [words[i] for i in order]
        self.train, self.test = words[len(words) // 5 :], words[: len(words) // 5]

    @staticmethod
    def translate(word: str) -> str:
        """The rule."""
        start = re.match(r"[^aeiou]*", word)[0]  # type: ignore[index]
        return word[len(start) :] + (start or "w") + "ay"

    def _encode(self, words: list[str]) -> Words:
        def padded(rows: list[list[int]]) -> Tensor:
            return nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), padding_value=self.pad).to(self.device)

        def codes(word: str) -> list[int]:
            return [ord(letter) - ord("a") + 2 for letter in word]

        targets = padded([[self.begin, *codes(self.translate(word)), self.end] for word in words])
        return Words(padded(list(map(codes, words))), torch.tensor(list(map(len, words))), targets)

    def model(self) -> nn.Module:
        return Attention(29, 128)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=2e-3)

    def batches(self, epoch: int) -> list[Words]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(epoch)).split(self.batch)
        return [self._encode([self.train[i] for i in part]) for part in order]

    def loss(self, model: nn.Module, batch: Words, state: Any) -> tuple[Tensor, None]:
        logits = model(batch.source, batch.lengths, batch.target[:-1])
        return model.criterion(logits.flatten(0, 1), batch.target[1:].flatten()), None

    def score(self, model: nn.Module) -> float:
        """Of the letters of unknown words, given the right ones before."""
        words = self._encode(self.test)
        found, expected = model(words.source, words.lengths, words.target[:-1]).argmax(2), words.target[1:]
        return float((found == expected)[expected != self.pad].double().mean())

    def show(self, model: nn.Module) -> str:
        """Translations of unknown words, letter by letter."""
        words = self._encode(self.test[:6])
        target = words.target[:1]
        for _ in range(12):
            logits = model(words.source, words.lengths, target)
            target = torch.cat([target, logits[-1:].argmax(2)])
        found = []
        for word, codes in zip(self.test, target[1:].t().tolist(), strict=False):
            codes = codes[: codes.index(self.end)] if self.end in codes else codes
            found.append(f"{word} -> {''.join(chr(code - 2 + ord('a')) for code in codes)}")
        return ", ".join(found)


def tasks(device: torch.device) -> Iterator[training.Task]:
    """Three models of characters, and a translation with attention."""
    for layer, least in ((nn.RNN, 0.36), (nn.LSTM, 0.31), (nn.GRU, 0.37)):
        yield CharacterModel(layer, least, device)
    yield Translation(device)
