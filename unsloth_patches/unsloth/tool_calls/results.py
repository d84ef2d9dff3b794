# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The calls of one assistant message and the results that follow it: paired, ordered, complete."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Sequence

from .errors import ToolCallError, where_in


class Turn(NamedTuple):
    """An assistant message with calls, and the results that follow it directly."""

    message: Dict[str, Any]
    results: List[Dict[str, Any]]
    index: int
    is_last: bool

    def arranged(self, mode: str, builtin_tools: Sequence[str], warn) -> List[Dict[str, Any]]:
        """The messages to render, results in call order."""
        calls = self.message["tool_calls"]
        if len(calls) > 1:
            self._check_mode(mode, builtin_tools)
        results = self._paired(warn)
        self._check_complete(results, mode)
        if mode != "split" or len(calls) == 1:
            return [self.message] + results
        pieces = []
        for position, call in enumerate(calls):
            pieces.append({**self.message, "tool_calls": [call]})
            is_last = position == len(calls) - 1
            pieces += results[position:] if is_last else results[position : position + 1]
        return pieces

    def _check_mode(self, mode: str, builtin_tools: Sequence[str]) -> None:
        names = [call["function"]["name"] for call in self.message["tool_calls"]]
        if mode == "error":
            raise ToolCallError(
                where_in(self.index)
                + f"has {len(names)} tool calls ({', '.join(names)}), and Llama 3 templates render "
                'one per message. Pass parallel_tool_calls = "split" (one assistant turn a call, '
                'as in Meta\'s format) or "join" (all calls in one turn) to get_chat_template.'
            )
        builtin = [name for name in names if name in builtin_tools]
        if mode == "join" and builtin:
            raise ToolCallError(
                where_in(self.index, names.index(builtin[0]) + 1, builtin[0])
                + "a built-in tool cannot share a turn with other calls; "
                'use parallel_tool_calls = "split".'
            )

    def _result_index(self, position: int) -> int:
        return self.index + 1 + position

    def _paired(self, warn) -> List[Dict[str, Any]]:
        """Results in call order: by id where there are ids, else as they stand."""
        calls, results = self.message["tool_calls"], self.results
        ids = [call["id"] for call in calls if "id" in call]
        for number, call in enumerate(calls, 1):
            if ids.count(call.get("id")) > 1:
                raise ToolCallError(
                    where_in(self.index, number, call["function"]["name"])
                    + f"the id {call['id']!r} is used twice; give every call its own."
                )
        with_id = [result for result in results if "tool_call_id" in result]
        if not with_id or (not ids and len(calls) == 1):
            self._check_positions(warn)
            return list(results)
        order = {}
        for position, result in enumerate(results):
            order[self._call_position(result, position, order)] = result
        return [order[position] for position in sorted(order)]

    def _call_position(self, result: Dict[str, Any], position: int, taken) -> int:
        call_id = result.get("tool_call_id")
        where = where_in(self._result_index(position))
        if call_id is None:
            raise ToolCallError(
                where + "has no tool_call_id, but other results beside it have one; add it."
            )
        ids = [call.get("id") for call in self.message["tool_calls"]]
        if call_id not in ids:
            raise ToolCallError(
                where
                + f"tool_call_id {call_id!r} is no call of messages[{self.index}], whose ids are "
                f"{ids}. Correct it, or leave out the ids to pair by position."
            )
        found = ids.index(call_id)
        if found in taken:
            raise ToolCallError(where + f"is a second result of call id {call_id!r}; keep one.")
        return found

    def _check_positions(self, warn) -> None:
        calls = self.message["tool_calls"]
        for position, result in enumerate(self.results):
            if position >= len(calls):
                # TRL's GRPO renders several results, with names, behind one dummy call.
                if "name" not in result:
                    warn(
                        where_in(self._result_index(position)),
                        f"is a result too many: messages[{self.index}] makes {len(calls)} call(s). "
                        "It is rendered as it is.",
                    )
                continue
            name = calls[position]["function"]["name"]
            if len(calls) > 1 and result.get("name", name) != name:
                raise ToolCallError(
                    where_in(self._result_index(position))
                    + f"is named {result['name']!r} and stands where the result of {name!r} "
                    "belongs. Put results in call order, or give calls an id and results a "
                    "tool_call_id."
                )

    def _check_complete(self, results: List[Dict[str, Any]], mode: str) -> None:
        calls = self.message["tool_calls"]
        by_id = {result.get("tool_call_id") for result in results} - {None}
        if by_id and len(calls) > 1:
            missing = [i for i, call in enumerate(calls) if call.get("id") not in by_id]
        else:
            missing = list(range(len(results), len(calls)))
        split = mode == "split" and len(calls) > 1
        open_end = self.is_last and (missing == [len(calls) - 1] if split else not results)
        if missing and not open_end:
            name = calls[missing[0]]["function"]["name"]
            hint = " Splitting needs a result after every call but the last." if split else ""
            raise ToolCallError(
                where_in(self.index, missing[0] + 1, name)
                + f"has no result. Add a message with role 'tool' after messages[{self.index}]."
                + hint
            )
