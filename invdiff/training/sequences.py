"""Training sequences of a masked prior: pictures as a tokenizer sees them, or symbols from a file."""

import csv
import hashlib
import io
import lzma
from pathlib import Path
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.networks.tokenizer import Tokenizer
from invdiff.training.masked_settings import MaskedSettings
from invdiff.training.pictures import held_out, training_pictures

PROMOTERS = "promoters"
PROMOTERS_FILE = "promoters.tsv.xz"
PROMOTER_CLASSES = ("Arabidopsis_tata", "Arabidopsis_non_tata", "Mouse_tata")
"""Classes of the file that are promoters, 251 nucleotides each."""
_TENTHS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}


@runtime_checkable
class Sequences(Protocol):
    """Where the sequences of a training come from."""

    def batch(self, n: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """Draw n training sequences."""
        ...

    def held_out(self, split: str, count: int) -> Int[Tensor, "n length"]:
        """Give the first sequences of the split "validation" or "test", of each data set; symbols have "train" too."""
        ...


def read_promoters(folder: Path, classes: tuple[str, ...] = PROMOTER_CLASSES) -> list[tuple[str, str]]:
    """Read (class, sequence) of the classes asked for, each sequence once, in the order of the file.

    Raises
    ------
    CatalogueError
        If the file is missing.
    InputError
        If it is not what it should be.
    """
    path = folder / PROMOTERS_FILE
    if not path.is_file():
        raise CatalogueError(f"The training data {path} is missing; give its folder with --data or INVDIFF_DATA.")
    try:
        text = lzma.decompress(path.read_bytes()).decode("ascii")
        pairs = [(kind, sequence) for kind, sequence in csv.reader(io.StringIO(text), delimiter="\t")]
    except (lzma.LZMAError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} is damaged, or not two columns, class and sequence: {error}.") from error
    first: dict[str, str] = {}
    for kind, sequence in pairs:
        if kind in classes:
            first.setdefault(sequence, kind)
    return [(kind, sequence) for sequence, kind in first.items()]


def part_of(sequence: str) -> str:
    """Split that a sequence belongs to, by its hash: eight tenths for training, one for validation, one for test."""
    tenth = int.from_bytes(hashlib.sha256(sequence.encode()).digest()[:8]) % 10
    return next(split for split, tenths in _TENTHS.items() if tenth in tenths)


def encode(sequences: list[str], alphabet: str) -> Int[Tensor, "n length"]:
    """Tokens of sequences of one length.

    Raises
    ------
    InputError
        If a symbol is not in the alphabet, or lengths differ.
    """
    if len({len(s) for s in sequences}) > 1:
        raise InputError("The sequences have different lengths.")
    codes = torch.full((256,), -1, dtype=torch.int64)
    codes[torch.tensor(list(alphabet.encode("ascii")))] = torch.arange(len(alphabet))
    found = codes[torch.tensor([list(s.encode("ascii")) for s in sequences])]
    if bool((found < 0).any()):
        raise InputError(f"A sequence has a symbol that is not in the alphabet {alphabet!r}.")
    return found


@final
class Promoters:
    """Promoter sequences, aligned at the start of transcription, each once, split by hash."""

    def __init__(self, folder: Path, length: int, alphabet: str, device: torch.device) -> None:
        kept: dict[str, list[str]] = {split: [] for split in _TENTHS}
        for _, sequence in read_promoters(folder):
            kept[part_of(sequence)].append(sequence)
        lengths = {len(sequence) for found in kept.values() for sequence in found}
        if lengths != {length} or not all(kept.values()):
            raise InputError(
                f"{folder / PROMOTERS_FILE} holds promoters of {sorted(lengths)} nucleotides, "
                f"{', '.join(f'{len(found)} for {split}' for split, found in kept.items())}; the settings ask for "
                f"some of each, and shape = [{length}]."
            )
        self._tokens = {split: encode(found, alphabet).to(device) for split, found in kept.items()}

    def batch(self, n: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """Draw n training sequences, with repetition."""
        tokens = self._tokens["train"]
        return tokens[torch.randint(len(tokens), (n,), generator=generator, device=tokens.device)]

    def held_out(self, split: str, count: int) -> Int[Tensor, "n length"]:
        """Give the first sequences of a split."""
        return self._tokens[split][:count]


@final
class TokenizedPictures:
    """Pictures of `pictures.training_pictures`, tokenized as they come, so that every crop and turn is its own."""

    def __init__(self, settings: MaskedSettings, folder: Path, tokenizer: Tokenizer, device: torch.device) -> None:
        self._pictures = training_pictures(settings.shape, settings.mixture, folder, device)
        self._folder, self._names, self._side = folder, tuple(settings.mixture), settings.shape[1]
        self._tokenizer, self._device = tokenizer.to(device), device

    def batch(self, n: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """Draw n training pictures' tokens."""
        x = self._pictures.batch(n, generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return self._tokenizer.encode(x)

    def held_out(self, split: str, count: int) -> Int[Tensor, "n length"]:
        """Give tokens of the first pictures of a split, of each data set."""
        found = [held_out(name, self._folder, split, self._side)[:count] for name in self._names]
        return torch.cat([self._tokenizer.encode(x.to(self._device)) for part in found for x in torch.split(part, 250)])


def training_sequences(
    settings: MaskedSettings, folder: Path, tokenizer: Tokenizer | None, device: torch.device
) -> Sequences:
    """Open the sequences of a training.

    Raises
    ------
    CatalogueError
        If a file is missing.
    InputError
        If the settings ask for data that there are not, or a picture's tokenizer is missing.
    """
    if tokenizer is not None:
        return TokenizedPictures(settings, folder, tokenizer, device)
    if tuple(settings.mixture) != (PROMOTERS,):
        raise InputError(f"Pictures need a tokenizer, and of sequences there is {PROMOTERS!r}; got {settings.mixture}.")
    return Promoters(folder, settings.shape[0], settings.alphabet, device)
