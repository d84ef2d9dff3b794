# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The calls of one assistant message and the results that follow it: paired and ordered."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from .errors import ToolCallError, where_in


class Turn(NamedTuple):
    """An assistant message with calls, and the results that follow it directly.

    index, places: where the message and its results stand in the conversation that was given.
    """

    message: Dict[str, Any]
    results: List[Dict[str, Any]]
    index: int
    places: List[int]
    is_last: bool

    @property
    def calls(self) -> List[Dict[str, Any]]:
        return self.message["tool_calls"]

    def where(self, number: int) -> str:
        """The place of call ``number`` (from 1), for errors."""
        return where_in(self.index, number, self.calls[number - 1]["function"]["name"])

    def paired(self, warn) -> List[Optional[Dict[str, Any]]]:
        """The result of each call, None where it has none, and then results too many.

        They are paired by id where there are ids, else as they stand.
        """
        calls, results = self.calls, self.results
        if len(calls) == len(results) == 1 and calls[0].get("id") == results[0].get("tool_call_id"):
            return list(results)
        ids = [call["id"] for call in calls if "id" in call]
        for number, call in enumerate(calls, 1):
            if ids.count(call.get("id")) > 1:
                raise ToolCallError(
                    self.where(number)
                    + f"the id {call['id']!r} is used twice; give every call its own."
                )
        with_id = [result for result in results if "tool_call_id" in result]
        if not with_id or (not ids and len(calls) == 1) or self._only_misnamed(warn):
            self._check_positions(warn)
            paired: List[Optional[Dict[str, Any]]] = list(results)
            paired += [None] * (len(calls) - len(results))
        else:
            order: Dict[int, Dict[str, Any]] = {}
            for position, result in enumerate(results):
                order[self._call_position(result, position, order)] = result
            paired = [order.get(position) for position in range(len(calls))]
        if not self.is_last or results:
            self._notice_missing(paired, warn)
        return paired

    def _only_misnamed(self, warn) -> bool:
        """One call and one result, whose ids differ: they belong together all the same."""
        if len(self.calls) != 1 or len(self.results) != 1:
            return False
        call_id, result_id = self.calls[0].get("id"), self.results[0].get("tool_call_id")
        if call_id != result_id:
            warn(
                where_in(self.places[0]),
                f"is the result of call id {result_id!r}, and the only call before it has id "
                f"{call_id!r}. They are rendered as a pair.",
            )
        return True

    def _call_position(self, result: Dict[str, Any], position: int, taken) -> int:
        call_id = result.get("tool_call_id")
        where = where_in(self.places[position])
        if call_id is None:
            raise ToolCallError(
                where + "has no tool_call_id, but other results beside it have one; add it."
            )
        ids = [call.get("id") for call in self.calls]
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
        calls = self.calls
        for position, result in enumerate(self.results):
            if position >= len(calls):
                # TRL's GRPO renders several results, with names, behind one dummy call.
                if "name" not in result:
                    warn(
                        where_in(self.places[position]),
                        f"is a result too many: messages[{self.index}] makes {len(calls)} call(s). "
                        "It is rendered as it is.",
                    )
                continue
            name = calls[position]["function"]["name"]
            if len(calls) > 1 and result.get("name", name) != name:
                raise ToolCallError(
                    where_in(self.places[position])
                    + f"is named {result['name']!r} and stands where the result of {name!r} "
                    "belongs. Put results in call order, or give calls an id and results a "
                    "tool_call_id."
                )

    def _notice_missing(self, paired: Sequence[Optional[Dict[str, Any]]], warn) -> None:
        missing = [number for number, result in enumerate(paired, 1) if result is None]
        if missing:
            warn(
                self.where(missing[0]),
                f"has no result. Add a message with role 'tool' after messages[{self.index}].",
            )


def one_call_a_message(
    turn: Turn, results: Sequence[Optional[Dict[str, Any]]], builtin_tools: Sequence[str], warn
) -> List[Dict[str, Any]]:
    """The message and its results, as Meta's templates render them: one call a message."""
    if len(turn.calls) > 1:
        names = [call["function"]["name"] for call in turn.calls]
        raise ToolCallError(
            where_in(turn.index)
            + f"has {len(names)} tool calls ({', '.join(names)}), and Llama 3 templates render "
            "one per message. Give each call its own message, its result after it."
        )
    return [turn.message, *filter(None, results)]
