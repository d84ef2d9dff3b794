# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Training on the last response alone, where split tool calls make it several turns."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Dict, List, Tuple

from .checks import tool_call_mode
from .parser import parse_tool_calls


def keep_every_call_of_last_response(stock):
    """``train_on_responses_only`` whose last response can be several calls, each a turn.

    With ``last_response_only`` and calls written by ``parallel_tool_calls = "split"``, the last
    response is the run of calls that ends the conversation, not its last piece alone; results stay
    masked. Otherwise it is the stock function.

    Decorates ``unsloth.chat_templates.train_on_responses_only``.
    """
    signature = inspect.signature(stock)
    wanted = {"trainer", "tokenizer", "return_function", "last_response_only"}
    if not wanted <= set(signature.parameters):
        raise NotImplementedError(
            "train_on_responses_only has other parameters than the known ones"
        )

    @functools.wraps(stock)
    def train_on_responses_only(*args, **kwargs):
        bound = signature.bind_partial(*args, **kwargs)
        given = bound.arguments
        trainer, tokenizer = given.get("trainer"), given.get("tokenizer")
        if tokenizer is None:
            tokenizer = getattr(trainer, "processing_class", getattr(trainer, "tokenizer", None))
        if tool_call_mode(tokenizer) != "split" or not given.get("last_response_only", False):
            return stock(*args, **kwargs)
        given["last_response_only"] = False
        keep_last_run = LastRun(tokenizer)
        if given.get("return_function", False):
            return _Chain(stock(*bound.args, **bound.kwargs), keep_last_run)
        return _map_datasets(stock(*bound.args, **bound.kwargs), keep_last_run)

    return train_on_responses_only


def _map_datasets(trainer, function):
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        if isinstance(dataset, dict):
            setattr(
                trainer,
                name,
                {k: _mapped(part, function, f"{name}[{k!r}]") for k, part in dataset.items()},
            )
        elif dataset is not None:
            setattr(trainer, name, _mapped(dataset, function, name))
    return trainer


def _mapped(dataset, function, name: str):
    row = next(iter(dataset), {})
    if "input_ids" not in row or "labels" not in row:
        raise ValueError(
            'Unsloth: last_response_only with parallel_tool_calls = "split" needs input_ids and '
            f'labels in {name}, which has {sorted(row)}. Use parallel_tool_calls = "join", or '
            "tokenize the dataset first."
        )
    return dataset.map(function, batched = True)


class _Chain:
    """The stock masking function, then ours on its labels. A class, so that it can be pickled."""

    def __init__(self, mask, keep):
        self._mask, self._keep = mask, keep

    def __call__(self, examples):
        return self._keep({**examples, **self._mask(examples)})


class LastRun:
    """Masks the labels of all but the last response, where a run of calls counts as one response.

    Takes and returns what ``train_on_responses_only(return_function = True)`` does: ``input_ids``
    and ``labels``, lists of rows or tensors of shape (rows, tokens); masked labels are -100. In
    tokens, split parallel calls are the same as calls made one after the other, and both are kept.
    """

    def __init__(self, tokenizer):
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._header = self._id("<|start_header_id|>")
        self._header_end = self._id("<|end_header_id|>")

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        if token_id is None or self._tokenizer.convert_ids_to_tokens(token_id) != token:
            raise ValueError(
                f"Unsloth: the tokenizer has no {token}, so turns cannot be told apart; "
                "last_response_only with split tool calls needs Llama 3's special tokens."
            )
        return token_id

    def __call__(self, examples: Dict[str, Any]) -> Dict[str, Any]:
        labels = examples["labels"]
        rows = [
            self._masked(_as_list(ids), _as_list(row))
            for ids, row in zip(examples["input_ids"], labels)
        ]
        return {"labels": labels.new_tensor(rows) if hasattr(labels, "new_tensor") else rows}

    def _masked(self, ids: List[int], labels: List[int]) -> List[int]:
        turns = self._turns(ids)
        trained = [
            t
            for t, (role, start, end) in enumerate(turns)
            if any(x != -100 for x in labels[start:end])
        ]
        if not trained:
            return labels
        first = self._first_of_last_run(ids, turns, trained[-1])
        kept = turns[first][1]
        return [-100] * kept + labels[kept:]

    def _first_of_last_run(
        self, ids: List[int], turns: List[Tuple[str, int, int]], last: int
    ) -> int:
        first = position = last
        while position >= 0 and turns[position][0] in ("assistant", "ipython"):
            role, start, end = turns[position]
            if role == "assistant":
                if not parse_tool_calls(ids[start:end], self._tokenizer).get("tool_calls"):
                    break
                first = position
            position -= 1
        return first

    def _turns(self, ids: List[int]) -> List[Tuple[str, int, int]]:
        """(role, start, end) of each turn's content, which ends at the next header."""
        headers = [i for i, token in enumerate(ids) if token == self._header]
        turns = []
        for header, following in zip(headers, headers[1:] + [len(ids)]):
            if self._header_end not in ids[header:following]:
                continue
            start = ids.index(self._header_end, header) + 1
            role = self._tokenizer.decode(ids[header + 1 : start - 1]).strip()
            turns.append((role, start, following))
        return turns


def _as_list(row) -> List[int]:
    return row.tolist() if hasattr(row, "tolist") else list(row)
