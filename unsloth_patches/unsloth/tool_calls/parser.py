# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tool calls out of what a Llama 3.x model wrote: whole replies, and streams.

Grammar of an assistant turn that calls tools, which the chat templates write and this reads::

    turn    := call ("; " call)* end
    call    := {"name": NAME, "parameters": OBJECT}
             | <|python_tag|>NAME.call(KEY="TEXT", ...)         (built-in tools, one per turn)
    end     := <|eot_id|> | <|eom_id|> | the end of the text

``; {"name"`` cannot stand inside a call: JSON has no ``;`` outside strings, and a string would have
to escape the quote. So the calls are told apart without guessing. Models drift, so a missing or
different separator, ``arguments`` for ``parameters`` and surrounding whitespace are read as well.
"""

from __future__ import annotations

import json
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

from .schemas import tool_names

# Names that can be written between quotes as they are, and those that every parser reads.
NAME_PATTERN = r'[^"\\\x00-\x1f\ud800-\udfff]+'
USUAL_NAME = r"[A-Za-z0-9_.-]+"
# Levels of nesting that arguments may have: json and the template recurse once for each.
MAX_DEPTH = 200
END_TOKENS = ("<|eot_id|>", "<|eom_id|>")

HEADER = re.compile(r"\s*<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*")
_OPENING = re.compile(r"\s*(?P<tag><\|python_tag\|>)?\s*")
_NEXT_CALL = re.compile(r"\s*;?\s*(?=\{)")
_BUILTIN_CALL = re.compile(rf'({USUAL_NAME})\.call\(((?:\w+="[^"]*"(?:, (?=\w)|(?=\))))*)\)')
_BUILTIN_ARGUMENT = re.compile(r'(\w+)="([^"]*)"')
_CALL_IN_TEXT = re.compile(r'\{\s*"name"\s*:')
_END = re.compile(r"\s*(?:" + "|".join(map(re.escape, END_TOKENS)) + r")\s*|\s+\Z")


class Broken(Exception):
    """The text is not a tool call; the message says why."""


# ---------------------------------------------------------------- public


def parse_tool_calls(
    text_or_ids,
    tokenizer = None,
    tools: Optional[list] = None,
) -> Dict[str, Any]:
    """The assistant message that a reply of a Llama 3.x model says.

    text_or_ids: the reply alone, without the prompt: text, or token ids (a list, or a tensor or
        array of shape (n,) or (1, n)). It may span several turns, calls and their results in turn,
        which is how ``parallel_tool_calls = "split"`` writes several calls.
    tokenizer: needed for ids; its end and padding tokens are cut from the reply's end.
    tools: the tools that exist, in any form that apply_chat_template takes (schemas, functions, JSON
        text); a call of another one is not a call.

    Returns ``{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function":
    {"name": str, "arguments": dict}}, ...]}``, or ``{"role": "assistant", "content": text}`` where
    the model called no tool. Broken output (cut-off JSON, an unknown tool, text around calls) comes
    back as such a text, with ``"reason"`` saying what is wrong: all calls are there, or none.

    Raises TypeError for ids without a tokenizer or of another type, ValueError for several rows of
    ids; never for what a model wrote.
    """
    text = _without_end(_as_text(text_or_ids, tokenizer), _end_tokens(tokenizer))
    known = None if tools is None else tool_names(tools)
    try:
        calls = list(_read_calls(text))
        check_known(calls, known)
    except Broken as error:
        return {"role": "assistant", "content": text.strip(), "reason": str(error)}
    if not calls:
        return {"role": "assistant", "content": text.strip()}
    return {"role": "assistant", "content": "", "tool_calls": calls}


# ---------------------------------------------------------------- replies and turns


def _read_calls(text: str) -> Iterator[Dict[str, Any]]:
    """Yields the calls of all turns, each as soon as it is read; none where the reply is a text.

    Raises Broken, possibly after some calls, where the reply is neither.
    """
    position, number = 0, 0
    while position < len(text):
        header = HEADER.match(text, position)
        role = header.group(1) if header else "assistant"
        start = header.end() if header else position
        if role in ("ipython", "tool") and number:
            position = skip_result(text, start)
            continue
        if role != "assistant":
            raise Broken(
                f"a turn of role {role!r} inside the reply: pass the assistant's reply alone"
            )
        if _is_text(text, start):
            if number or _CALL_IN_TEXT.search(text, start):
                raise Broken("text around a tool call")
            return
        for call, position in _calls_of_turn(text, start, number + 1):
            number += 1
            yield call
        position = _skip_end(text, position)
        if position < len(text) and not HEADER.match(text, position):
            raise Broken(f"text after call {number}: {text[position : position + 40]!r}")


def _is_text(text: str, start: int) -> bool:
    """Whether a turn calls nothing. A JSON object without a name is an answer, not a call."""
    opening = _OPENING.match(text, start)
    if opening.group("tag"):
        return False
    if not text.startswith("{", opening.end()):
        return True
    try:
        value, _ = JSON_DECODER.raw_decode(text, opening.end())
    except (ValueError, RecursionError):
        return False
    return "name" not in value


def _calls_of_turn(text: str, start: int, number: int) -> Iterator[Tuple[Dict[str, Any], int]]:
    """Yields each call of one turn and the position after it; number: the first one's."""
    position = _OPENING.match(text, start).end()
    if not text.startswith("{", position):
        yield read_builtin_call(text, position)
        return
    following = _OPENING.match(text, start)
    while following:
        call, position = read_json_call(text, following.end(), number)
        yield call, position
        number += 1
        following = _NEXT_CALL.match(text, position)


# ---------------------------------------------------------------- one call


def _reject_constant(constant: str):
    raise ValueError(f"{constant} is not JSON")


def _unique_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


JSON_DECODER = json.JSONDecoder(parse_constant = _reject_constant, object_pairs_hook = _unique_keys)


def read_json_call(text: str, position: int, number: int) -> Tuple[Dict[str, Any], int]:
    """Call ``number``, which starts at ``position``, and where it ends; raises Broken."""
    try:
        value, end = JSON_DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise Broken(f"call {number} is not complete, valid JSON ({error})") from None
    return _as_call(value, number), end


def _as_call(value: Dict[str, Any], number: int) -> Dict[str, Any]:
    name, keys = value.get("name"), set(value)
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise Broken(f"call {number} has no valid name: {name!r}")
    given = keys & {"parameters", "arguments"}
    if len(given) != 1 or keys - given - {"name", "type"}:
        raise Broken(
            f"call {number} ({name!r}) has the keys {sorted(keys)}, expected name, parameters"
        )
    arguments = value[given.pop()]
    if isinstance(arguments, str):
        arguments = _object_in_text(arguments)
    if not isinstance(arguments, dict):
        raise Broken(f"the parameters of call {number} ({name!r}) are not an object")
    _check_writable(arguments, number)
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _check_writable(arguments: Dict[str, Any], number: int) -> None:
    """What is handed out can be rendered again: 1e400 is infinity, and "\\ud800" is no UTF-8."""
    try:
        text = json.dumps(arguments, ensure_ascii = False, allow_nan = False)
        text.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Broken(f"the parameters of call {number} cannot be written again ({error})") from None
    if is_too_deep(text):
        raise Broken(f"the parameters of call {number} are nested over {MAX_DEPTH} levels deep")


def is_too_deep(text: str) -> bool:
    """Whether a JSON text has more than ``MAX_DEPTH`` levels."""
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return False
    level, brackets = 0, re.sub(r'"(?:[^"\\]|\\.)*"|[^][{}"]', "", text, flags = re.DOTALL)
    for bracket in brackets:
        level += 1 if bracket in "[{" else -1
        if level > MAX_DEPTH:
            return True
    return False


def _object_in_text(text: str) -> Any:
    """Models also write the parameters as JSON in a string."""
    try:
        return JSON_DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def read_builtin_call(text: str, position: int) -> Tuple[Dict[str, Any], int]:
    """``tool.call(name="value")`` at ``position``, and where it ends; raises Broken."""
    match = _BUILTIN_CALL.match(text, position)
    if match is None:
        raise Broken("what follows <|python_tag|> is not a call of a built-in tool")
    function = {
        "name": match.group(1),
        "arguments": dict(_BUILTIN_ARGUMENT.findall(match.group(2))),
    }
    return {"type": "function", "function": function}, match.end()


def check_known(calls: List[Dict[str, Any]], known: Optional[List[str]]) -> None:
    """known: names of the tools that exist; None: any."""
    for number, call in enumerate(calls, 1):
        name = call["function"]["name"]
        if known is not None and name not in known:
            raise Broken(
                f"call {number} is of an unknown tool {name!r} (known: {', '.join(known)})"
            )


# ---------------------------------------------------------------- text and ids


def skip_result(text: str, position: int) -> int:
    """Position after a tool's result. The template writes texts, lists and objects as JSON, so an
    end token inside them is no end; anything else goes up to the next end token."""
    try:
        after = JSON_DECODER.raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        after = position
    if _skip_end(text, after) > after:
        return _skip_end(text, after)
    ends = [text.find(token, position) for token in END_TOKENS]
    return _skip_end(text, min((end for end in ends if end >= 0), default = len(text)))


def _skip_end(text: str, position: int) -> int:
    """Position after whitespace and the end tokens of a turn."""
    match = _END.match(text, position)
    while match:
        position = match.end()
        match = _END.match(text, position)
    return position


def _without_end(text: str, end_tokens: Tuple[str, ...]) -> str:
    """The text without the end and padding tokens at its end (a batch pads with many)."""
    shorter = True
    while shorter:
        shorter = False
        for token in end_tokens:
            stripped = text.rstrip()
            if stripped.endswith(token):
                text, shorter = stripped[: -len(token)], True
    return text


def _inner(tokenizer):
    """The text tokenizer of a processor, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _end_tokens(tokenizer) -> Tuple[str, ...]:
    own = (getattr(_inner(tokenizer), name, None) for name in ("eos_token", "pad_token"))
    return END_TOKENS + tuple(str(token) for token in own if token)


def _as_text(text_or_ids, tokenizer) -> str:
    if isinstance(text_or_ids, str):
        return text_or_ids
    return decode(as_ids(text_or_ids), tokenizer)


def as_ids(ids) -> List[int]:
    """One row of token ids: from a tensor, an array, [1, length] or a list; raises for more rows."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, int) and not isinstance(ids, bool):
        return [ids]
    if isinstance(ids, (list, tuple)) and len(ids) == 1 and isinstance(ids[0], (list, tuple)):
        ids = ids[0]
    if isinstance(ids, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in ids):
        raise ValueError(f"parse_tool_calls got {len(ids)} rows of ids; call it once for each row")
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
        raise TypeError(f"parse_tool_calls takes text or token ids, not {type(ids).__name__}")
    return list(ids)


def decode(ids: List[int], tokenizer) -> str:
    """The text of token ids with every special token in it, byte for byte."""
    if tokenizer is None:
        raise TypeError("parse_tool_calls needs the tokenizer to read token ids")
    # Llama's tokenizer_config asks for clean_up_tokenization_spaces, which would alter arguments.
    return _inner(tokenizer).decode(
        ids, skip_special_tokens = False, clean_up_tokenization_spaces = False
    )
