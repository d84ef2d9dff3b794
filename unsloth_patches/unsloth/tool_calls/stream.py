# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tool calls out of a reply that is still being written, in time linear in its length."""

from __future__ import annotations

import json
import re
from typing import Any, Callable, Dict, List, Optional

from .parser import (
    END_TOKENS,
    HEADER,
    JSON_DECODER,
    Broken,
    as_ids,
    check_known,
    decode,
    parse_tool_calls,
    read_builtin_call,
    read_json_call,
    skip_result,
)
from .schemas import tool_names

_HEADER_START, _HEADER_END, _TAG = "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"
# A character of UTF-8 has up to four bytes, and so spans at most four tokens.
_TOKENS_OF_A_CHARACTER = 4


class ToolCallStream:
    """Reads a reply while it is being written, and hands out each call as soon as it is complete.

    ``feed(piece)`` takes text or token ids and returns the calls that the piece completed (usually
    none); ``finish()`` returns what ``parse_tool_calls`` says of the whole reply. A call is handed
    out when its closing brace is read. Text after it that makes the reply broken is seen only at
    the end: ``finish()`` then gives a ``reason``.
    """

    def __init__(
        self,
        tokenizer = None,
        tools = None,
    ):
        self._tokenizer, self._tools = tokenizer, tools
        self._decoder = _Decoder(tokenizer)
        self._turns = _Turns(None if tools is None else tool_names(tools))
        self._pieces: List[str] = []

    def feed(self, text_or_ids) -> List[Dict[str, Any]]:
        """Calls, in order, that this piece of text (or these token ids) completed."""
        piece = text_or_ids
        if not isinstance(piece, str):
            piece = self._decoder.feed(as_ids(text_or_ids))
        self._pieces.append(piece)
        return self._turns.feed(piece)

    def finish(self) -> Dict[str, Any]:
        """The whole reply's message, as ``parse_tool_calls`` returns it."""
        text = "".join(self._pieces) + self._decoder.rest()
        return parse_tool_calls(text, self._tokenizer, self._tools)


class _Decoder:
    """Token ids as text. A character can span tokens, so the last ones may have to wait."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._before: List[int] = []  # decoded last: some tokenizers treat a text's start otherwise
        self._waiting: List[int] = []

    def feed(self, ids: List[int]) -> str:
        self._waiting += ids
        for kept in range(min(_TOKENS_OF_A_CHARACTER, len(self._waiting))):
            ready = self._waiting[: len(self._waiting) - kept]
            text = self._decode_new(ready)
            if not text.endswith("\ufffd"):
                return self._hand_out(ready, text)
        if len(self._waiting) < _TOKENS_OF_A_CHARACTER:
            return ""
        return self.rest()  # the model wrote bytes that are no UTF-8

    def rest(self) -> str:
        return self._hand_out(self._waiting, self._decode_new(self._waiting))

    def _decode_new(self, ids: List[int]) -> str:
        if not ids:
            return ""
        before = decode(self._before, self._tokenizer) if self._before else ""
        return decode(self._before + ids, self._tokenizer)[len(before) :]

    def _hand_out(self, ids: List[int], text: str) -> str:
        self._waiting = self._waiting[len(ids) :]
        self._before = ids[-_TOKENS_OF_A_CHARACTER:] or self._before
        return text


class _Closing:
    """Finds where the first bracket of a text that comes in pieces is closed again."""

    def __init__(self, brackets: str, has_escapes: bool):
        self._marks = re.compile(
            "[" + re.escape(brackets + '"') + (r"\\" if has_escapes else "") + "]"
        )
        self._open, self._close = brackets
        self._level, self._length, self._escaped = 0, 0, -1
        self._in_string = False

    def feed(self, piece: str) -> int:
        """Position after the closing bracket, in all that was fed; -1 where it is not there yet."""
        for match in self._marks.finditer(piece):
            mark, position = match.group(), self._length + match.start()
            if position == self._escaped:
                continue
            if mark == "\\":
                self._escaped = position + 1 if self._in_string else -1
            elif mark == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._level += 1 if mark == self._open else -1
                if self._level <= 0:
                    return position + 1
        self._length += len(piece)
        return -1


class _Turns:
    """Where in the grammar of ``parser.py`` a reply stands that comes in pieces.

    Each state takes the text that is not read yet and returns what is left of it, or None where it
    has to wait for more.
    """

    def __init__(self, known: Optional[List[str]]):
        self._known = known
        self._state: Callable[[str], Optional[str]] = self._turn
        self._unread: List[str] = []
        self._closing: Optional[_Closing] = None
        self._end, self._has_end = -1, False
        self._calls: List[Dict[str, Any]] = []
        self._number = 0

    def feed(self, piece: str) -> List[Dict[str, Any]]:
        if self._state == self._over:
            return []
        self._unread.append(piece)
        if self._closing is not None and self._end < 0:
            self._end = self._closing.feed(piece)
            if self._end < 0:
                return []
        elif self._state == self._result and ">" not in piece and not self._has_end:
            return []
        rest: Optional[str] = "".join(self._unread)
        try:
            while rest is not None:
                self._unread = [rest]
                rest = self._state(rest)
        except Broken:
            self._state = self._over
        calls, self._calls = self._calls, []
        return calls

    def _over(self, text: str) -> None:
        """The reply is a text, or broken: no more calls come."""

    def _turn(self, text: str) -> Optional[str]:
        start = text.lstrip()
        if not start or _may_become(start, _HEADER_START):
            return None
        if not start.startswith(_HEADER_START):
            self._state = self._opening
            return start
        if _HEADER_END not in start:
            return None
        header = HEADER.match(start)
        role = header.group(1) if header else ""
        states = {"assistant": self._opening}
        if self._number:
            states.update(ipython = self._result, tool = self._result)
        self._state, self._has_end = states.get(role, self._over), False
        return start[header.end() :] if header else None

    def _opening(self, text: str) -> Optional[str]:
        start = text.lstrip()
        if not start or _may_become(start, _TAG):
            return None
        if not start.startswith(_TAG):
            return self._begin(start, "{}", self._json_call)
        start = start[len(_TAG) :].lstrip()
        if not start:
            return None
        brackets, state = ("{}", self._json_call) if start[0] == "{" else ("()", self._builtin_call)
        return self._begin(start, brackets, state)

    def _begin(self, text: str, brackets: str, state) -> Optional[str]:
        if brackets == "{}" and text[0] != "{":
            self._state = self._over
            return None
        self._closing = _Closing(brackets, has_escapes = brackets == "{}")
        self._state, self._end = state, self._closing.feed(text)
        return text

    def _json_call(self, text: str) -> Optional[str]:
        if self._end < 0:
            return None
        call, end = read_json_call(text, 0, self._number + 1)
        return self._hand_out(call, text[end:], self._after)

    def _builtin_call(self, text: str) -> Optional[str]:
        if self._end < 0:
            return None
        call, end = read_builtin_call(text, 0)
        return self._hand_out(call, text[end:], self._ended)

    def _hand_out(self, call: Dict[str, Any], rest: str, state) -> str:
        check_known([call], self._known)
        self._calls.append(call)
        self._number += 1
        self._state, self._closing = state, None
        return rest

    def _after(self, text: str) -> Optional[str]:
        start = text.lstrip()
        following = start[1:].lstrip() if start.startswith(";") else start
        if not following:
            return None
        if following[0] == "{":
            return self._begin(following, "{}", self._json_call)
        self._state = self._over if start.startswith(";") else self._ended
        return start

    def _ended(self, text: str) -> Optional[str]:
        start = text.lstrip()
        if not start or any(_may_become(start, mark) for mark in (*END_TOKENS, _HEADER_START)):
            return None
        for token in END_TOKENS:
            if start.startswith(token):
                return start[len(token) :]
        self._state = self._turn if start.startswith(_HEADER_START) else self._over
        return start

    def _result(self, text: str) -> Optional[str]:
        text = text.lstrip()
        self._has_end = self._has_end or any(token in text for token in END_TOKENS)
        if not self._has_end:
            return None
        try:
            rest = text[JSON_DECODER.raw_decode(text)[1] :].lstrip()
            if not rest or any(_may_become(rest, token) for token in END_TOKENS):
                return None
        except json.JSONDecodeError as error:
            # An end token inside a JSON text that is not complete yet is none.
            if error.msg.startswith("Unterminated") or error.pos >= len(text) - len("\\u0000"):
                return None
        except (ValueError, RecursionError):
            pass
        self._state = self._turn
        return text[skip_result(text, 0) :]


def _may_become(text: str, mark: str) -> bool:
    """Whether ``text`` is the beginning of ``mark``, and not all of it."""
    return len(text) < len(mark) and mark.startswith(text)
