"""Text against policies: CoPE-A, a LoRA adapter on Gemma-2, from local directories only.

    MODELS_ROOT/gemma/[BASE/]    config.json and weights
    MODELS_ROOT/gemma/ADAPTER/   adapter_config.json and its weights

The model reads a prompt for each policy and text and answers "1" or "0"; the score is the probability of "1".
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_audio.contracts import Classification
from lab_audio.errors import ConfigError, Fatal
from lab_audio.log import get_logger
from lab_audio.models.revision import revision
from lab_audio.models.runtime import (
    gpu_errors_are_fatal,
    is_out_of_memory,
    loading,
    model_directories,
    offline_imports,
    select_device,
    the_one,
)

# The prompt that CoPE-A was trained with, to the letter.
_INSTRUCTIONS = (
    "INSTRUCTIONS\n============\n\n"
    "Examine the given POLICY and determine if the given CONTENT meets the criteria for ANY of the LABELS. "
    'Answer "1" if yes, and "0" if no.\n\n\nPOLICY\n======\n\n'
)
_CONTENT = "\n\n\nCONTENT\n=======\n\n"
_ANSWER = "\n\n\nANSWER\n======\n\n"

VIOLATES, COMPLIES = "violates", "complies"
LEAST_ROOM = 64  # tokens of content; a policy that leaves less is refused
_OVERLAP = 64  # tokens that two neighbouring chunks share, so that no sentence is cut in both
_STEP = 512  # tokens read at once: attention's memory grows with step x context, not with context squared


@dataclass(frozen=True)
class Policy:
    """A policy in CoPE's format; sha256 is that of its file."""

    name: str
    text: str
    sha256: str


def load_policies(directory: Path) -> list[Policy]:
    """The directory's *.txt files by name; ConfigError if there is none, or one is empty or not UTF-8."""
    if not directory.is_dir():
        raise ConfigError(f"POLICIES_DIR: {directory} is not a directory")
    try:
        paths = sorted(path for path in directory.glob("*.txt") if path.is_file())
        contents = [path.read_bytes() for path in paths]
    except OSError as error:
        raise ConfigError(f"POLICIES_DIR: {directory} cannot be read: {error.strerror}") from None
    if not paths:
        raise ConfigError(f"POLICIES_DIR: {directory} holds no policy (*.txt)")
    policies = []
    for path, content in zip(paths, contents, strict=True):
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").strip()
        except UnicodeDecodeError:
            raise ConfigError(f"POLICIES_DIR: {path} is not UTF-8") from None
        if not text:
            raise ConfigError(f"POLICIES_DIR: {path} is empty")
        policies.append(Policy(path.stem, text, hashlib.sha256(content).hexdigest()))
    return policies


def prompt(policy: str, content: str) -> str:
    """The whole prompt; the next token is the answer."""
    return f"{_INSTRUCTIONS}{policy}{_CONTENT}{content}{_ANSWER}"


def on_one_line(text: str) -> str:
    """A text that cannot spell the prompt's headings, each of which has lines of its own."""
    return " ".join(text.split())


@dataclass(frozen=True)
class _Prefix:
    """A policy read by the model: the part of the prompt that all its texts share."""

    tokens: int
    cache: Any


class Classifier:
    """A loaded base model with its adapter merged in. Not thread-safe."""

    def __init__(self, models_root: Path, device: str, *, max_tokens: int = 8192, batch_tokens: int = 16384) -> None:
        """Load from models_root/gemma onto `cpu` (float32), `cuda` or `cuda:N` (bfloat16).

        max_tokens: of one prompt. batch_tokens: of all prompts read together, policy and padding counted; one
        takes some 350 kB of GPU memory with a 9B model. Raises ConfigError where the models are not as they
        should be, Fatal without lab-audio[gpu] or GPU.
        """
        base, adapter = find_gemma(models_root)
        with offline_imports(models_root):
            import torch
            from peft import PeftModel
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging

            logging.disable_progress_bar()
        kind, index = select_device(device)
        self._device = kind if kind == "cpu" else f"{kind}:{index}"
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens
        self._prefixes: dict[str, _Prefix] = {}
        with loading(base, device):
            self._tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
        self._labels = self._check_tokenizer(base)
        with loading(base, device):
            model = AutoModelForCausalLM.from_pretrained(
                str(base),
                local_files_only=True,
                dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
                device_map={"": self._device},
                attn_implementation="eager",  # the others leave out Gemma-2's soft cap on attention
            )
        with loading(adapter, device):
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True)
            self._model = model.merge_and_unload().eval()
        self.model_revision = revision(base)
        self.adapter_revision = revision(adapter)

    def prepare(self, policies: Sequence[Policy]) -> None:
        """Read the policies ahead of the first text; ConfigError for one that leaves no room for content."""
        for policy in policies:
            self._prefix(policy)

    def classify(self, texts: Sequence[str], policies: Sequence[Policy]) -> list[list[Classification]]:
        """For each text its classification by each policy, in the order given.

        A text too long for one prompt is scored in chunks, and the highest score counts.
        Raises ConfigError for a policy that leaves no room for content, Fatal if the GPU fails.
        """
        results: list[list[Classification]] = [[] for _text in texts]
        for policy in policies:
            prefix = self._prefix(policy)
            tails = [self._tails(on_one_line(text), self._max_tokens - prefix.tokens) for text in texts]
            scores = iter(self._scores(prefix, [tail for chunks in tails for tail in chunks]))
            for result, chunks in zip(results, tails, strict=True):
                result.append(self._classification(policy, [next(scores) for _chunk in chunks]))
        return results

    def _classification(self, policy: Policy, chunks: list[float]) -> Classification:
        score = max(chunks)
        return Classification(
            policy=policy.name,
            policy_sha256=policy.sha256,
            label=VIOLATES if score >= 0.5 else COMPLIES,
            score=score,
            model=self.model_revision,
            adapter=self.adapter_revision,
            chunks=chunks,
        )

    def _encode(self, text: str, *, start: bool = False) -> list[int]:
        """Token ids; text that spells a special token stays text."""
        ids: list[int] = self._tokenizer(
            text,
            add_special_tokens=start,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return ids

    def _check_tokenizer(self, base: Path) -> list[int]:
        """The token ids of "0" and "1"; ConfigError where the tokenizer does not allow what is done here."""
        if not self._tokenizer.is_fast:
            raise ConfigError(f"MODELS_ROOT: {base} needs a fast tokenizer (tokenizer.json)")
        zero, one = self._encode("0"), self._encode("1")
        if len(zero) != 1 or len(one) != 1:
            raise ConfigError(f'MODELS_ROOT: the tokenizer in {base} does not have "0" and "1" as single tokens')
        special = "".join(self._tokenizer.all_special_tokens)
        if set(self._encode(special)) & set(self._tokenizer.all_special_ids):
            raise ConfigError(f"MODELS_ROOT: the tokenizer in {base} takes special tokens from plain text")
        self._check_split("The policy.", f"What is said. {special}", f"the tokenizer in {base}")
        return zero + one

    def _check_split(self, policy: str, content: str, what: str) -> None:
        split = self._encode(_INSTRUCTIONS + policy, start=True) + self._encode(_CONTENT + content + _ANSWER)
        if split != self._encode(prompt(policy, content), start=True):
            raise ConfigError(f"{what}: tokens of the policy and of the content run into each other")

    def _prefix(self, policy: Policy) -> _Prefix:
        """Instructions and policy, read once and kept for as many policies as fit into max_tokens."""
        if kept := self._prefixes.pop(policy.text, None):
            self._prefixes[policy.text] = kept
            return kept
        self._check_split(policy.text, "What is said.", f"POLICIES_DIR: policy {policy.name}")
        ids = self._encode(_INSTRUCTIONS + policy.text, start=True)
        room = self._max_tokens - len(ids) - len(self._encode(_CONTENT + _ANSWER))
        if room < LEAST_ROOM:
            raise ConfigError(
                f"POLICIES_DIR: policy {policy.name} takes {len(ids)} of {self._max_tokens} tokens "
                f"and leaves less than {LEAST_ROOM} for content: shorten it"
            )
        from transformers import DynamicCache

        prefix = _Prefix(len(ids), DynamicCache(config=self._model.config))
        self._read(prefix.cache, [ids])
        self._prefixes[policy.text] = prefix
        while sum(p.tokens for p in self._prefixes.values()) > self._max_tokens:
            del self._prefixes[next(iter(self._prefixes))]
        return prefix

    def _tails(self, text: str, limit: int) -> list[list[int]]:
        """The prompt from CONTENT on, in at most `limit` tokens: once, or once for each chunk of the text."""
        whole = self._encode(_CONTENT + text + _ANSWER)
        if len(whole) <= limit:
            return [whole]
        spans = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )["offset_mapping"]
        room = limit - len(self._encode(_CONTENT + _ANSWER))
        overlap = min(_OVERLAP, room // 8)
        tails = []
        start = end = 0
        while end < len(spans):
            end = min(start + room, len(spans))
            tail = self._tail_of(text[spans[start][0] : spans[end - 1][1]])
            while len(tail) > limit and end - start > 1:  # a piece by itself may take a few tokens more
                end = max(start + 1, end - (len(tail) - limit))
                tail = self._tail_of(text[spans[start][0] : spans[end - 1][1]])
            tails.append(tail)
            start = max(start + 1, end - overlap)
        return tails

    def _tail_of(self, piece: str) -> list[int]:
        return self._encode(_CONTENT + piece.strip() + _ANSWER)

    def _scores(self, prefix: _Prefix, tails: list[list[int]]) -> list[float]:
        """P("1") of each tail after the prefix; those of like length are read together."""
        scores = [math.nan] * len(tails)
        order = sorted(range(len(tails)), key=lambda i: len(tails[i]))
        while order:
            width = prefix.tokens + len(tails[order[-1]])
            count = max(1, min(len(order), self._batch_tokens // width))
            batch = order[-count:]
            try:
                read = self._read_after(prefix, [tails[i] for i in batch])
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                self._batch_tokens = width * count // 2
                get_logger().warning("GPU memory is short: smaller batches from now on", tokens=self._batch_tokens)
                continue
            del order[-count:]
            for i, score in zip(batch, read, strict=True):
                scores[i] = score
        if not all(map(math.isfinite, scores)):
            raise Fatal("the classifier's scores are not numbers: its weights or the GPU are broken")
        return scores

    def _read_after(self, prefix: _Prefix, rows: list[list[int]]) -> list[float]:
        cache = copy.deepcopy(prefix.cache)
        if len(rows) > 1:
            cache.batch_repeat_interleave(len(rows))
        return self._read(cache, rows)

    def _read(self, cache: Any, rows: list[list[int]]) -> list[float]:
        """Read token ids after what the cache holds, which grows; P("1") after each row.

        Rows are padded on the right: no token looks ahead, so none sees padding or shifts in its window.
        """
        import torch

        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id or 0
        last = torch.tensor([len(row) - 1 for row in rows], device=self._device)
        scores = torch.empty(len(rows), device=self._device)
        with torch.inference_mode(), gpu_errors_are_fatal(self._device):
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self._device)
            for start in range(0, width, _STEP):
                step = ids[:, start : start + _STEP]
                hidden = self._model.model(input_ids=step, past_key_values=cache, use_cache=True).last_hidden_state
                ends = ((last >= start) & (last < start + _STEP)).nonzero()[:, 0]
                logits = self._model.lm_head(hidden[ends, last[ends] - start])[:, self._labels].float()
                if cap := self._model.config.final_logit_softcapping:
                    logits = torch.tanh(logits / cap) * cap
                scores[ends] = torch.softmax(logits, -1)[:, 1]
            result: list[float] = scores.tolist()
        return result


def find_gemma(models_root: Path) -> tuple[Path, Path]:
    """The base model's and the adapter's directory in models_root/gemma; ConfigError unless one of each."""
    root = models_root / "gemma"
    directories = model_directories(root)
    adapters = [path for path in directories if (path / "adapter_config.json").is_file()]
    bases = [
        path for path in directories if path not in adapters and (path / "config.json").is_file() and _has_weights(path)
    ]
    return the_one(bases, "base model (config.json and weights)", root), the_one(
        adapters, "adapter (adapter_config.json)", root
    )


def _has_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
